"""Exemplar buffer, the replay strategy and the table of strategies."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnheads.benchmarks.streams import Stream, make_stream
from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError, DivergedError, UnknownNameError
from nnheads.heads import list_heads
from nnheads.heads.memory_head import MemoryHead
from nnheads.strategies import list_strategies, strategy_spec
from nnheads.strategies.buffer import ExemplarBuffer
from nnheads.strategies.learner import Setup
from nnheads.strategies.quiet import import_avalanche, quiet_avalanche

SHAPE = (1, 8, 8)


def images_of(labels: list[int], first_id: int = 0) -> ImageSet:
    """Images whose first pixel is their id."""
    ids = torch.arange(first_id, first_id + len(labels))
    images = torch.zeros(len(labels), *SHAPE, dtype=torch.uint8)
    images[:, 0, 0, 0] = ids.to(torch.uint8)
    return ImageSet(images, torch.tensor(labels), ids, tuple("abcdefghij"))


def small_stream(experiences: int = 2, per_class: int = 30) -> Stream:
    """The first experiences of split-digits with a few images of each class."""
    whole = make_stream("split-digits", seed=0)
    rows, parts, start = [], [], 0
    for e in range(experiences):
        part = whole.train_indices(e)
        chosen = torch.cat([part[whole.train.labels[part] == c][:per_class] for c in whole.experiences[e]])
        rows.append(chosen)
        parts.append(torch.arange(start, start + len(chosen)))
        start += len(chosen)
    train = whole.train.subset(torch.cat(rows))
    return replace(whole, train=train, experiences=whole.experiences[:experiences], train_parts=tuple(parts))


def replay_setup(stream: Stream, head: str = "impostor", **options: Any) -> Setup:
    from nnheads.backbones import build_backbone

    import_avalanche()
    torch.manual_seed(0)
    given = {"epochs": 1, "batch_size": 16, "replay_batch": 16, "memory": 20, "learning_rate": 0.05, "seed": 0}
    return Setup(
        backbone=build_backbone("convnet", num_classes=10, in_channels=1),
        head=head,
        benchmark=stream.benchmark,
        preprocessing=stream.preprocessing,
        class_names=stream.class_names,
        augment="crop",
        device=torch.device("cpu"),
        **{**given, **options},
    )


# ---- the buffer --------------------------------------------------------------------------------------------------


def test_buffer_shares_the_budget_among_the_classes_seen() -> None:
    buffer = ExemplarBuffer(10, SHAPE)
    data = images_of([0] * 20 + [1] * 20 + [2] * 20)
    buffer.offer(data, torch.arange(20))
    assert len(buffer) == 10
    buffer.offer(data, torch.arange(20, 40))
    assert torch.bincount(buffer.labels).tolist() == [5, 5]
    buffer.offer(data, torch.arange(40, 60))
    assert torch.bincount(buffer.labels).tolist() == [3, 3, 3]


def test_buffer_keeps_image_and_label_with_their_id() -> None:
    data = images_of([0, 1, 2] * 30)
    buffer = ExemplarBuffer(7, SHAPE, seed=3)
    for rows in torch.randperm(90).split(11):
        buffer.offer(data, rows)
        held = buffer.exemplars()
        assert torch.equal(held.images[:, 0, 0, 0].long(), held.ids)
        assert torch.equal(held.labels, data.labels[held.ids])
        assert len(held.ids.unique()) == len(held)


def test_buffer_choice_depends_on_the_seed_and_not_on_the_order() -> None:
    data = images_of([0, 1] * 50)

    def chosen(seed: int, order: Tensor, chunk: int) -> set[int]:
        buffer = ExemplarBuffer(10, SHAPE, seed=seed)
        for rows in order.split(chunk):
            buffer.offer(data, rows)
        return set(buffer.ids.tolist())

    forward = chosen(0, torch.arange(100), 8)
    assert forward == chosen(0, torch.arange(100).flip(0), 100)
    assert forward != chosen(1, torch.arange(100), 8)


def test_buffer_choice_is_uniform() -> None:
    data = images_of([0] * 40)
    counts = torch.zeros(40)
    for seed in range(400):
        buffer = ExemplarBuffer(10, SHAPE, seed=seed)
        buffer.offer(data, torch.arange(40))
        counts[buffer.ids] += 1
    # 400 draws at 1/4: mean 100, standard deviation 8.7
    assert counts.min() > 60
    assert counts.max() < 140


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(1, 12),
    batches=st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 200)), min_size=1, max_size=20), max_size=8),
)
def test_buffer_never_exceeds_budget_or_quota(budget: int, batches: list[list[tuple[int, int]]]) -> None:
    buffer = ExemplarBuffer(budget, SHAPE)
    label_of: dict[int, int] = {}
    held: set[int] = set()
    for batch in batches:
        samples = {i: label_of.setdefault(i, label) for label, i in batch}
        data = ImageSet(
            torch.zeros(len(samples), *SHAPE, dtype=torch.uint8),
            torch.tensor(list(samples.values())),
            torch.tensor(list(samples)),
            tuple("abcde"),
        )
        if len({*buffer.classes_seen, *data.labels.tolist()}) > budget:
            with pytest.raises(ConfigError, match=r"smaller than the . classes seen"):
                buffer.offer(data, torch.arange(len(data)))
            assert set(buffer.ids.tolist()) == held
            continue
        change = buffer.offer(data, torch.arange(len(data)))
        assert len(buffer) <= budget
        assert all(count <= buffer.quota for count in torch.bincount(buffer.labels).tolist())
        now = set(buffer.ids.tolist())
        assert now - held == set(data.ids[change.entered].tolist())
        assert held - now == set(change.left.tolist())
        held = now


def test_buffer_offered_the_same_again_holds_the_same() -> None:
    data = images_of([0, 0, 1, 2, 2, 2, 1, 0, 2, 1] * 6)
    buffer = ExemplarBuffer(15, SHAPE)
    for rows in torch.arange(60).split(7):
        buffer.offer(data, rows)
    held = buffer.ids
    for rows in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(11):
        change = buffer.offer(data, rows)
        assert not len(change.entered)
        assert not len(change.left)
    assert torch.equal(buffer.ids, held)


def test_buffer_draws_what_came_before_an_experience() -> None:
    data = images_of([0] * 10 + [1] * 10)
    buffer = ExemplarBuffer(20, SHAPE)
    generator = torch.Generator().manual_seed(0)
    buffer.offer(data, torch.arange(10), experience=0)
    assert len(buffer.draw(4, generator, before=0).rows) == 0
    buffer.offer(data, torch.arange(10, 20), experience=1)
    drawn = buffer.draw(10, generator, before=1)
    assert drawn.labels.tolist() == [0] * 10
    assert len(drawn.ids.unique()) == 10
    assert torch.equal(buffer.images_at(drawn.rows), data.images[drawn.ids])
    assert len(buffer.draw(30, generator).rows) == 30


def test_buffer_state_goes_on_as_if_uninterrupted() -> None:
    data = images_of([0, 1] * 50)
    first, second = ExemplarBuffer(10, SHAPE, seed=5), ExemplarBuffer(10, SHAPE)
    first.offer(data, torch.arange(60), experience=2)
    second.load_state(*first.state())
    for buffer in (first, second):
        buffer.offer(data, torch.arange(60, 100), experience=3)
    drawn = [b.draw(5, torch.Generator().manual_seed(1), before=3) for b in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert first.bytes == sum(t.numel() * t.element_size() for t in first.state()[0].values())
    with pytest.raises(ConfigError, match="10 saved exemplars do not fit a memory of 5"):
        ExemplarBuffer(5, SHAPE).load_state(*first.state())


# ---- the table ---------------------------------------------------------------------------------------------------


def test_every_strategy_has_its_factory() -> None:
    import_avalanche()
    for spec in list_strategies():
        module, _, function = spec.factory.partition(":")
        assert callable(vars(importlib.import_module(module))[function]), spec.name


def test_unknown_strategy_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'er-ace'"):
        strategy_spec("er-ac")


def test_a_strategy_with_its_own_classifier_refuses_a_head() -> None:
    assert strategy_spec("replay").resolve_head("nngk") == "nngk"
    assert strategy_spec("replay").resolve_head(None) == "impostor"
    assert strategy_spec("er-ace").resolve_head("dense") == "dense"
    assert strategy_spec("icarl").resolve_head(None) == "nearest-class-mean"
    for name, head in (("icarl", "dense"), ("scr", "impostor"), ("slda", "knn")):
        with pytest.raises(ConfigError, match=f"strategy '{name}' brings its own classifier .* head '{head}'"):
            strategy_spec(name).resolve_head(head)
    with pytest.raises(ConfigError, match="trains the backbone's dense classifier"):
        strategy_spec("naive").resolve_head("impostor")


# ---- replay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["impostor", "nngk", "kernel", "knn", "nca"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_memory_at_test_is_the_buffer(head: str, ema: float | None) -> None:
    from nnheads.strategies.replay_learner import ReplayLearner

    stream = small_stream()
    learner = ReplayLearner(replay_setup(stream, head, ema=ema))
    for e in range(2):
        learner.learn(e)
        answering = learner.headed_model()
        assert isinstance(answering.head, MemoryHead)
        memory = answering.head.memory
        assert sorted(memory.ids[: len(memory)].tolist()) == sorted(learner.buffer.ids.tolist())
        assert len(memory) == learner.exemplars == 20
    by_id = {int(i): int(c) for i, c in zip(stream.train.ids, stream.train.labels, strict=True)}
    assert [by_id[i] for i in memory.ids[:20].tolist()] == memory.labels[:20].tolist()


@pytest.mark.parametrize("head", ["impostor", "nngk", "knn"])
def test_centers_at_test_are_embeddings_of_the_answering_backbone(head: str) -> None:
    from nnheads.strategies.replay_learner import ReplayLearner

    learner = ReplayLearner(replay_setup(small_stream(), head, ema=0.9, precision="float32"))
    learner.learn(0)
    model = learner.headed_model().eval()
    assert isinstance(model.head, MemoryHead)
    held = learner.buffer.exemplars()
    rows = model.head.memory.rows_of(held.ids)
    with torch.no_grad():
        z = model.features(learner.setup.preprocessing(held.images))
    torch.testing.assert_close(model.head.memory.keys[rows], z, atol=1e-4, rtol=1e-4)


def test_budget_holds_for_exemplars_and_centers_at_every_step() -> None:
    from nnheads.strategies.replay_learner import ReplayLearner

    held: list[tuple[int, int]] = []

    def watch(samples: int) -> None:
        memory = learner.strategy.head.memory
        held.append((len(learner.buffer), len(memory)))
        assert sorted(memory.ids[: len(memory)].tolist()) == sorted(learner.buffer.ids.tolist())

    learner = ReplayLearner(replay_setup(small_stream(3), memory=13, on_step=watch))
    for e in range(3):
        learner.learn(e)
    assert len(held) >= 12
    assert max(exemplars for exemplars, _ in held) <= 13
    assert max(centers for _, centers in held) <= 13


@pytest.mark.parametrize("head", ["impostor", "nngk", "kernel", "knn"])
def test_a_buffer_that_was_loaded_is_replayed_and_centers_without_exemplars_leave(head: str) -> None:
    from nnheads.strategies.replay_learner import ReplayLearner

    first = ReplayLearner(replay_setup(small_stream(), head))
    first.learn(0)
    again = ReplayLearner(replay_setup(small_stream(), head))
    again.buffer.load_state(*first.buffer.state())
    z = torch.randn(30, again.strategy.head.in_features)
    again.strategy.head.memorize(z, torch.arange(30) % 10, ids=torch.arange(5000, 5030))  # as after another training
    again.learn(1)
    assert again.gradient_samples == first.gradient_samples + 4 * 16
    memory = again.strategy.head.memory
    assert sorted(memory.ids[: len(memory)].tolist()) == sorted(again.buffer.ids.tolist())


def test_embeddings_that_are_not_finite_end_training_with_one_line() -> None:
    from nnheads.strategies.replay_learner import ReplayLearner

    learner = ReplayLearner(replay_setup(small_stream(), "dense", learning_rate=1e30))
    with pytest.raises(DivergedError, match="training diverged: embeddings are not finite any more; give a lower lr"):
        learner.learn(0)


def test_a_memory_that_no_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory of 1,000,000,000,000,000 exemplars is more than this machine"):
        ExemplarBuffer(10**15, SHAPE)


def test_new_classes_have_centers_from_their_first_step() -> None:
    from nnheads.strategies.replay_learner import ReplayLearner

    stream = small_stream()
    seen: list[set[int]] = []
    learner = ReplayLearner(
        replay_setup(stream, on_step=lambda n: seen.append(set(learner.strategy.head.memory.labels.tolist())))
    )
    learner.learn(0)
    seen.clear()
    learner.learn(1)
    assert set(stream.experiences[1]) <= seen[0]


def test_replay_batches_hold_new_samples_then_old_ones() -> None:
    from nnheads.strategies.replay_learner import ReplayLearner

    stream = small_stream()
    learner = ReplayLearner(replay_setup(stream))
    batches: list[Tensor] = []
    strategy = learner.strategy
    original = strategy.criterion

    def record() -> Tensor:
        batches.append(strategy.mb_y)
        return original()

    strategy.criterion = record
    learner.learn(0)
    learner.learn(1)
    first, second = set(stream.experiences[0]), set(stream.experiences[1])
    assert all(set(y.tolist()) <= first for y in batches[:4])
    assert len(batches) == 8
    for y in batches[4:]:
        assert set(y[:-16].tolist()) <= second
        assert set(y[-16:].tolist()) <= first
    assert learner.gradient_samples == sum(len(y) for y in batches) == 2 * 60 + 4 * 16


def test_the_average_over_an_experience_takes_the_place_of_its_weights() -> None:
    import_avalanche()
    from avalanche.core import SupervisedPlugin

    from nnheads.strategies.replay_learner import ReplayLearner
    from nnheads.training import embed

    learner = ReplayLearner(replay_setup(small_stream(), ema=0.9))
    weight = learner.strategy.model.backbone.conv1.weight
    average, steps = weight.detach().clone(), 0

    class Recurrence(SupervisedPlugin):  # type: ignore[misc]
        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            nonlocal average, steps
            decay = min(0.9, (1 + steps) / (10 + steps))
            average = weight.detach().clone() if steps == 0 else decay * average + (1 - decay) * weight.detach()
            steps += 1

    learner.strategy.plugins.append(Recurrence())
    for experience in (0, 1):
        steps = 0  # every experience begins an average of its own, from the last one
        learner.learn(experience)
        assert steps > 1
        torch.testing.assert_close(learner.headed_model().backbone.conv1.weight.detach(), average)
    assert sorted(learner.memory_parts()) == ["centers", "exemplars"]
    head = learner.headed_model().head
    z, _, ids = embed(learner.headed_model(), learner.buffer.exemplars(), device="cpu")
    torch.testing.assert_close(head.memory.keys[head.memory.rows_of(ids)], z, atol=1e-5, rtol=1e-4)


def test_avalanche_evaluates_and_logs_it_like_its_own() -> None:
    import_avalanche()
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    from nnheads.attach import attach_head
    from nnheads.data import get_augmentation
    from nnheads.strategies.replay import ReplayStrategy

    stream = small_stream()
    setup = replay_setup(stream)
    with quiet_avalanche():
        strategy = ReplayStrategy(
            model=attach_head(setup.backbone, "impostor", num_classes=10),
            preprocessing=stream.preprocessing,
            augment=get_augmentation("none"),
            buffer=ExemplarBuffer(20, SHAPE),
            learning_rate=0.05,
            replay_batch=16,
            train_epochs=4,
            train_mb_size=16,
            evaluator=EvaluationPlugin(accuracy_metrics(epoch=True, experience=True, stream=True)),
        )
        trained = strategy.train(stream.benchmark.train_stream[0], eval_streams=[])
        found = strategy.eval(stream.benchmark.test_stream[:1])
    [accuracy] = [v for name, v in found.items() if name.startswith("Top1_Acc_Stream/eval_phase")]
    assert accuracy > 0.9
    assert any(name.startswith("Top1_Acc_Epoch/train_phase") for name in trained)


@pytest.mark.parametrize(
    ("head", "options"),
    [
        *((name, {}) for name in list_heads()),
        ("impostor", {"centers": "tied", "whiten": 0.3}),
        ("nngk", {"bytes_per_center": 16}),
        ("kernel", {"track": False}),
        ("knn", {"vote": "gaussian"}),
    ],
    ids=str,
)
def test_watching_with_metrics_changes_nothing(head: str, options: dict[str, Any]) -> None:
    """Weights, centers, widths and exemplars are the same with an evaluator that has metrics."""
    import_avalanche()
    from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
    from avalanche.training.plugins import EvaluationPlugin

    from nnheads.attach import attach_head
    from nnheads.strategies.replay import ReplayStrategy

    stream = small_stream()
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        metrics = (accuracy_metrics(epoch=True, minibatch=True), loss_metrics(epoch=True))
        with quiet_avalanche():
            strategy = ReplayStrategy(
                model=attach_head(replay_setup(stream).backbone, head, num_classes=10, **options),
                preprocessing=stream.preprocessing,
                augment="crop",
                buffer=ExemplarBuffer(40, SHAPE),
                learning_rate=0.05,
                train_epochs=2,
                train_mb_size=16,
                evaluator=EvaluationPlugin(*metrics, loggers=[]) if watched else None,
            )
            for experience in stream.benchmark.train_stream:
                strategy.train(experience, eval_streams=[])
        states.append({**strategy.model.state_dict(), "exemplars": strategy.buffer.ids})
    alone, watched_too = states
    assert alone.keys() == watched_too.keys()
    differing = [name for name in alone if not torch.equal(alone[name].nan_to_num(), watched_too[name].nan_to_num())]
    assert not differing


def test_plugins_that_cannot_work_are_refused() -> None:
    """At once, and where they were added later before anything is trained; others are left alone."""
    import_avalanche()
    from avalanche.core import SupervisedPlugin
    from avalanche.training import plugins

    from nnheads.attach import attach_head
    from nnheads.strategies.replay import ReplayStrategy

    stream = small_stream()

    def strategy_with(*given: Any) -> Any:
        model = attach_head(replay_setup(stream).backbone, "impostor", num_classes=10)
        return ReplayStrategy(
            model=model, preprocessing=stream.preprocessing, buffer=ExemplarBuffer(20, SHAPE), plugins=given
        )

    class Own(SupervisedPlugin):  # type: ignore[misc]
        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            self.loss = float(strategy.loss.detach())

    with quiet_avalanche():
        for plugin in (
            plugins.LwFPlugin(1.0, 2.0),
            plugins.EWCPlugin(1.0),
            plugins.MASPlugin(),
            plugins.RWalkPlugin(),
            plugins.GEMPlugin(5, 0.5),
            plugins.AGEMPlugin(20, 16),
            plugins.ReplayPlugin(20),
        ):
            with pytest.raises(ConfigError, match=f"{type(plugin).__name__} does not work with ReplayStrategy") as said:
                strategy_with(plugin)
            assert "\n" not in str(said.value)
            late = strategy_with()
            late.plugins.append(plugin)
            with pytest.raises(ConfigError, match=f"{type(plugin).__name__} does not work"):
                late.train(stream.benchmark.train_stream[0], eval_streams=[])
            assert not late.gradient_samples
        own = Own()
        strategy = strategy_with(own, plugins.SynapticIntelligencePlugin(1.0))
        schedule = torch.optim.lr_scheduler.StepLR(strategy.optimizer, 1, 0.5)
        strategy.plugins.append(plugins.LRSchedulerPlugin(schedule, reset_scheduler=False, reset_lr=False))
        strategy.train(stream.benchmark.train_stream[0], eval_streams=[])
    assert own.loss > 0
    assert strategy.optimizer.param_groups[0]["lr"] == 0.05


def test_avalanche_evaluates_classes_to_come_and_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    import_avalanche()
    from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
    from avalanche.logging import InteractiveLogger
    from avalanche.training.plugins import EvaluationPlugin

    from nnheads.attach import attach_head
    from nnheads.strategies.replay import ReplayStrategy

    stream = small_stream()
    with quiet_avalanche():
        strategy = ReplayStrategy(
            model=attach_head(replay_setup(stream).backbone, "knn", num_classes=2),
            preprocessing=stream.preprocessing,
            buffer=ExemplarBuffer(20, SHAPE),
            learning_rate=0.05,
            evaluator=EvaluationPlugin(
                accuracy_metrics(stream=True), loss_metrics(stream=True), loggers=[InteractiveLogger()]
            ),
        )
        strategy.train(stream.benchmark.train_stream[0], eval_streams=[])
        found = strategy.eval(stream.benchmark.test_stream)
    [accuracy] = [v for name, v in found.items() if name.startswith("Top1_Acc_Stream/eval_phase")]
    counts = [len(stream.test_indices(e)) for e in range(len(stream))]
    assert 0 < accuracy <= counts[0] / sum(counts), "classes to come cannot be right"


def test_a_wider_head_joins_the_optimizer() -> None:
    from nnheads.strategies.replay_learner import ReplayLearner

    learner = ReplayLearner(replay_setup(small_stream(), "dense"))
    learner.learn(0)
    learner.strategy.head.widen(12)
    learner.learn(1)
    held = {id(p) for group in learner.strategy.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in learner.strategy.model.parameters()}


# ---- losses and solvers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["avalanche-replay", "der", "icarl", "scr", "slda"])
def test_avalanche_computes_in_the_precision_asked_for(name: str) -> None:
    stream = small_stream()
    x = stream.test.images[:8].float() / 16

    def scores(precision: Any) -> Tensor:
        setup = replay_setup(stream, "dense", precision=precision)
        setup = replace(setup, benchmark=stream.avalanche_benchmark(transformed=True, ids=False))
        torch.manual_seed(1)
        learner = strategy_spec(name).build(setup)
        learner.learn(0)
        model = learner.headed_model()
        assert model is None or torch.equal(model(x).argmax(1), learner.scores(x).argmax(1)) or precision == "bfloat16"
        assert learner.scores(x).dtype == torch.float32
        return learner.scores(x)

    float32 = scores("float32")
    assert torch.equal(scores("auto"), float32)
    lower = scores("bfloat16")
    assert not torch.equal(lower, float32)
    seen = float32 > torch.finfo(torch.float32).min
    assert seen.any()
    torch.testing.assert_close(lower[seen], float32[seen], rtol=0.2, atol=0.2 * float(float32[seen].abs().max()))


def test_gem_projects_onto_the_nearest_gradient_that_hurts_nothing() -> None:
    import_avalanche()
    from nnheads.strategies.plugins import GEM

    torch.manual_seed(0)
    plugin = GEM(10, 0.0)
    plugin.G = torch.randn(3, 20)
    g = torch.randn(20) - plugin.G.sum(0)
    projected = plugin.solve_quadprog(g)
    assert bool((plugin.G @ projected > -0.05).all())
    # no other point that satisfies the constraints is nearer: the correction is a non-negative mix of active ones
    mix = torch.linalg.lstsq(plugin.G.T, (projected - g).unsqueeze(1)).solution.squeeze(1)
    assert bool((mix > -1e-4).all())
    assert float(((plugin.G @ projected) * mix).abs().max()) < 0.05 * float(mix.max())


def test_an_id_that_comes_again_with_another_image_is_told() -> None:
    for exemplar_bytes in (None, 192):
        size = (3, 16, 16)
        first = ImageSet(torch.randint(0, 255, (30, *size), dtype=torch.uint8), torch.arange(30) % 3)
        second = ImageSet(255 - first.images, first.labels)
        buffer = ExemplarBuffer(12, size, exemplar_bytes=exemplar_bytes)
        buffer.offer(first, torch.arange(30))
        buffer.offer(first, torch.arange(30), 1)  # the same samples again
        held = buffer.ids
        with pytest.raises(DataError, match="another image of an earlier experience: ids must not repeat"):
            buffer.offer(second, torch.arange(30), 1)
        assert torch.equal(buffer.ids, held)
