"""Avalanche's strategies as their authors meant them, where Avalanche has them otherwise or leaves it to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nnheads.benchmarks.config import RunConfig
from nnheads.benchmarks.run_setup import build_learner, load_stream
from nnheads.benchmarks.streams import Stream, make_stream
from nnheads.data import Preprocessing
from nnheads.errors import ConfigError, DivergedError
from nnheads.strategies import list_strategies, strategy_spec
from nnheads.strategies.avalanche_options import DEROptions, GDumbOptions
from nnheads.strategies.learner import Learner

QUICK = RunConfig(stream="split-digits", share=0.2, epochs=1, memory=20, batch_size=16)


def learner(name: str, **settings: Any) -> Learner:
    """A strategy on a fifth of the digits, nothing learned yet."""
    config, spec = replace(QUICK, strategy=name, **settings), strategy_spec(name)
    stream, resolved = load_stream(config, spec, lambda *_: None)
    return build_learner(resolved, spec, stream, torch.device("cpu"), lambda _: None)


def learner_on(stream: Stream, name: str, **settings: Any) -> Learner:
    """The same on a stream of one's own, of images as the digits are."""
    config, spec = replace(QUICK, strategy=name, **settings), strategy_spec(name)
    _, resolved = load_stream(config, spec, lambda *_: None)
    return build_learner(resolved, spec, stream, torch.device("cpu"), lambda _: None)


def unequal() -> Stream:
    """Two experiences of two classes; one class of the second is rare, and a memory of 20 not full any more."""
    whole = make_stream("split-digits", seed=0)
    rows = [
        torch.cat([part[whole.train.labels[part] == c][:many] for c, many in zip(classes, counts, strict=True)])
        for part, classes, counts in (
            (whole.train_indices(e), whole.experiences[e], counts) for e, counts in enumerate(((13, 13), (3, 13)))
        )
    ]
    parts = (torch.arange(26), torch.arange(26, 42))
    return replace(
        whole, train=whole.train.subset(torch.cat(rows)), experiences=whole.experiences[:2], train_parts=parts
    )


def strategy_of(made: Learner) -> Any:
    return vars(made)["strategy"]


def test_scr_decides_by_the_means_of_the_exemplars_as_they_are_embedded_now() -> None:
    made = learner("scr", epochs=2)
    for experience in range(2):
        made.learn(experience)
    strategy = strategy_of(made)
    held = strategy.replay_plugin.storage_policy.buffer_datasets
    assert len(held) == 4
    strategy.model.eval()
    for data in held:
        x = torch.stack([data.eval()[i][0] for i in range(len(data))])
        label = int(data[0][1])
        with torch.no_grad():
            z = torch.nn.functional.normalize(strategy.model.feature_extractor(x), dim=1).mean(0)
        torch.testing.assert_close(strategy.model.eval_classifier.class_means_dict[label], z / z.norm())


def test_the_network_that_teaches_icarl_answers_for_each_image_by_itself() -> None:
    made = learner("icarl")
    made.learn(0)
    [loss] = [p for p in strategy_of(made).plugins if type(p).__name__ == "ICaRLLossPlugin"]
    taught: list[Tensor] = []
    loss.old_model.feature_extractor.register_forward_hook(lambda module, args, z: taught.append(z))
    before = {name: value.clone() for name, value in loss.old_model.named_buffers()}

    def unchanged(*_: object) -> None:  # before the next network takes its place
        assert all(torch.equal(value, before[name]) for name, value in loss.old_model.named_buffers())

    loss.old_model.feature_extractor.register_forward_hook(unchanged)
    made.learn(1)
    assert taught
    assert made.memory_parts() == {"exemplars": made.exemplars * 64}


def test_the_rate_of_icarl_is_of_a_sum_over_the_classes() -> None:
    made = learner("icarl", learning_rate=0.03)
    made.learn(0)
    strategy = strategy_of(made)
    optimizer = strategy.optimizer
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.3])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(strategy_of(made).model.parameters())
    )


def test_icarls_exemplars_get_the_border_that_new_images_get() -> None:
    made = learner("icarl")
    [plugin] = [p for p in strategy_of(made).plugins if type(p).__name__ == "_ICaRLPlugin"]
    preprocessing = vars(made)["setup"].preprocessing
    black = preprocessing(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))[0]
    for _ in range(10):
        torch.testing.assert_close(plugin.buffer_transform(black), black)


def test_gdumb_can_spend_its_samples_on_the_network_that_answers_at_the_end() -> None:
    made = learner("gdumb", epochs=3, strategy_options={"last_samples": 210})
    for experience in range(4):
        made.learn(experience)
    assert made.gradient_samples == 4 * 3 * 20
    made.learn(4)
    assert made.gradient_samples == 4 * 3 * 20 + 200  # whole passes
    roomy = learner("gdumb", memory=1000, strategy_options={"last_samples": 800})
    for experience in range(4):
        roomy.learn(experience)
    before = roomy.gradient_samples
    roomy.learn(4)
    assert roomy.exemplars == 287  # all there are
    assert roomy.gradient_samples - before == 3 * 287  # as near to 800 as whole passes come
    assert made.memory_parts() == {"exemplars": 20 * 64}


@pytest.mark.parametrize("name", ["er-ace", "der", "avalanche-replay"])
def test_a_memory_that_a_rare_class_leaves_half_empty_is_replayed(name: str) -> None:
    made = learner_on(unequal(), name, memory=20, replay_batch=32)
    made.learn(0)
    first = made.gradient_samples
    made.learn(1)
    # one batch of new samples, and old ones beside it
    assert made.gradient_samples - first > 16


def test_gdumb_counts_what_it_holds() -> None:
    made = learner_on(unequal(), "gdumb", memory=20, strategy_options={"last_samples": 500})
    made.learn(0)
    before = made.gradient_samples
    made.learn(1)
    assert made.exemplars < 20
    assert made.gradient_samples - before == pytest.approx(500, abs=20)


@pytest.mark.parametrize("name", ["er-ace", "der", "avalanche-replay"])
def test_a_memory_smaller_than_a_batch_of_it_is_replayed(name: str) -> None:
    made = learner(name, memory=20, replay_batch=64)
    passed = []
    for experience in range(2):
        made.learn(experience)
        passed.append(made.gradient_samples)
    first, second = passed[0], passed[1] - passed[0]
    assert second >= first + 4 * 20 - 16  # 20 in each of its steps, of which there may be one fewer


@pytest.mark.parametrize("name", [spec.name for spec in list_strategies() if spec.averages and not spec.ours])
def test_averaged_weights_take_the_place_of_the_trained_ones(name: str) -> None:
    from avalanche.core import SupervisedPlugin

    made = learner(name, ema=0.9, epochs=2, share=0.1)
    strategy = strategy_of(made)
    average, steps = torch.zeros(0), 0

    class Recurrence(SupervisedPlugin):  # type: ignore[misc]
        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            nonlocal average, steps
            weight = next(strategy.model.parameters()).detach()
            decay = min(0.9, (1 + steps) / (10 + steps))
            average = weight.clone() if steps == 0 else decay * average + (1 - decay) * weight
            steps += 1

    strategy.plugins.append(Recurrence())
    for experience in range(1 if name == "joint" else 2):
        steps = 0  # each experience begins an average of its own, from the last one
        made.learn(experience)
        assert steps > 2
        torch.testing.assert_close(next(strategy.model.parameters()).detach(), average)


def test_der_keeps_the_answers_of_the_averaged_network() -> None:
    made = learner("der", ema=0.9)
    made.learn(0)
    strategy = strategy_of(made)
    x, _, _, logits = next(iter(torch.utils.data.DataLoader(strategy.storage_policy.buffer.eval(), batch_size=20)))
    torch.testing.assert_close(logits, made.scores(x))


def test_weights_of_der() -> None:
    made = learner("der", strategy_options={"alpha": 0.3, "beta": 1.0})
    assert (strategy_of(made).alpha, strategy_of(made).beta) == (0.3, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DEROptions(alpha=-1), "alpha of strategy 'der' must be a number, 0 or more, not -1"),
        (lambda: DEROptions(beta=True), "beta of strategy 'der' must be a number, 0 or more, not True"),
        (lambda: GDumbOptions(last_samples=0), "last_samples of strategy 'gdumb' must be a whole number, 1 or more"),
    ],
)
def test_options_that_cannot_work(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


class TestViews:
    def views(self, x: Tensor, *, flip: bool = True, seed: int = 0) -> Tensor:
        from nnheads.strategies.views import ContrastiveViews

        torch.manual_seed(seed)
        return ContrastiveViews(self.preprocessing, flip)(x)

    preprocessing = Preprocessing((16, 16), 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))

    def test_each_image_is_changed_by_itself_and_by_the_seed_alone(self) -> None:
        image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        x = self.preprocessing(image).expand(8, -1, -1, -1)
        found = self.views(x)
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert len(found.flatten(1).unique(dim=0)) == 8
        assert torch.equal(found, self.views(x))
        assert not torch.equal(found, self.views(x, seed=1))
        low, high = (self.preprocessing(torch.full((1, 3, 16, 16), v, dtype=torch.uint8)) for v in (0, 255))
        assert bool(((found >= low - 1e-4) & (found <= high + 1e-4)).all())

    def test_what_must_not_be_mirrored_is_not(self) -> None:
        ramp = torch.linspace(0, 255, 16).to(torch.uint8).expand(64, 3, 16, 16)
        x = self.preprocessing(ramp)
        straight = self.views(x, flip=False).mean((1, 2))
        mirrored = self.views(x).mean((1, 2))
        assert bool((straight[:, -1] >= straight[:, 0] - 1e-4).all())
        assert not bool((mirrored[:, -1] >= mirrored[:, 0] - 1e-4).all())


@pytest.mark.parametrize("name", ["der", "er-ace", "avalanche-replay", "gem"])
def test_weights_that_are_not_finite_end_a_run_as_ours_do(name: str) -> None:
    made = learner(name, learning_rate=1e30)
    with pytest.raises(DivergedError, match="training diverged: weights are not finite any more; give a lower lr"):
        made.learn(0)


def test_der_puts_its_buffer_together_once_an_experience(monkeypatch: pytest.MonkeyPatch) -> None:
    made = learner("der", replay_batch=8)
    strategy = strategy_of(made)
    made.learn(0)
    held = len(strategy.storage_policy.buffer)
    looks = []
    policy = type(strategy.storage_policy)
    whole = policy.buffer
    monkeypatch.setattr(policy, "buffer", property(lambda self: looks.append(1) or whole.fget(self)))
    assert strategy.batch_size_mem == 8
    strategy.batch_size_mem = 10_000
    made.learn(1)
    assert strategy.batch_size_mem == held
    assert len(looks) < 8, "at each step"
