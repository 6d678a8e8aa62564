"""Two and four gloo processes against one: neighbours, trained weights, predictions, checkpoints, and a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nnheads
from nnheads import distributed
from nnheads.errors import CheckpointError, ConfigError
from nnheads.sharded import ShardedMemory

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
HEADS = ("nca", "nngk", "impostor", "biased")


def samples() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (203,), generator=generator)
    centers = torch.randn(5, 8, generator=generator)
    return centers[labels] + 0.5 * torch.randn(203, 8, generator=generator), labels, torch.arange(203) * 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 5))


def test_a_process_has_its_own_device_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not distributed.take_device()  # not started by torchrun
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert distributed.take_device()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")  # fewer devices than processes
    assert not distributed.take_device()


def trained(head: str, folder: Path) -> nnheads.HeadedModel:
    """A small network without batch norm, which sees whole batches whatever the number of processes."""
    net = network()
    x, y, _ = samples()
    cut = {"at": "1", "example": x[:2], "dim": 4, "gate_epochs": 0, "threshold": 2.0} if head == "biased" else {}
    model = nnheads.attach_head(net, head, **cut)
    if distributed.rank():  # the first process's weights count
        with torch.no_grad():
            net[0].weight.add_(1)
    data = torch.utils.data.TensorDataset(x, y)
    nnheads.fit(model, data, epochs=2, batch_size=50, lr=0.05, device="cpu", progress=False, checkpoint=folder / head)
    return model


def gated() -> nnheads.HeadedModel:
    """One with batch norm in its backbone and in its projector, trained on images."""
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(60, 1, 8, 8, generator=generator), torch.arange(60) % 3)
    torch.manual_seed(0)
    net = nnheads.build_backbone("convnet", 3, in_channels=1, width=4)
    model = nnheads.attach_head(net, "biased", at="bn1", example=data.tensors[0][:2], dim=4, gate_epochs=1)
    nnheads.fit(model, data, epochs=2, batch_size=20, lr=0.05, device="cpu", progress=False)
    return model


def sharded() -> ShardedMemory:
    keys, labels, ids = samples()
    memory = ShardedMemory(8, 5)
    memory.add(keys, labels, ids)
    memory.drop(ids[10:20])
    return memory


def worker(rank: int, world: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    torch.set_num_threads(1)
    assert distributed.join()
    memory = sharded()
    assert len(memory) == 193
    assert len(memory.own) < 193
    queries = samples()[0][rank::world] + 0.1  # each process asks for other rows, and for another number of them
    found = memory.neighbors(queries, 7)
    memory.save(folder / "memory.safetensors")
    again = ShardedMemory(8, 5)
    again.load(folder / "one.safetensors")
    assert torch.equal(again.neighbors(queries, 7).ids, found.ids)
    assert memory.search(queries[:1], 300)[0, 193:].tolist() == [-1] * 107
    results = {"found": found._asdict(), "queries": queries}
    for head in HEADS:
        model = trained(head, folder / "models")
        weights = dict(distributed.sharing(model).state_dict())
        results[head] = {"weights": weights, "log_probs": model(samples()[0]).detach()}
    results["gated"] = dict(gated().state_dict())
    torch.save(results, folder / f"{rank}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardedMemory, dict[str, nnheads.HeadedModel], Path]:
    folder = tmp_path_factory.mktemp("alone")
    memory = sharded()
    memory.save(folder / "one.safetensors")
    return memory, {head: trained(head, folder) for head in HEADS}, folder


@pytest.mark.parametrize("world", [2, 4])
def test_processes_find_train_and_answer_as_one(
    world: int, alone: tuple[ShardedMemory, dict[str, nnheads.HeadedModel], Path], tmp_path: Path
) -> None:
    memory, models, folder = alone
    (tmp_path / "one.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    (tmp_path / "port").write_text(str(_free_port()))
    command = [sys.executable, str(Path(__file__).resolve())]
    started = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    told = [process.communicate(timeout=300)[1] for process in started]
    assert all(process.returncode == 0 for process in started), told
    x = samples()[0]
    for rank in range(world):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        expected = memory.neighbors(results["queries"], 7)
        assert torch.equal(results["found"]["ids"], expected.ids)
        assert torch.equal(results["found"]["labels"], expected.labels)
        torch.testing.assert_close(results["found"]["distances"], expected.distances)
        for head, model in models.items():
            near = 1e-3 if head == "biased" else 1e-4  # rounding moves its projector further
            for name, weight in distributed.sharing(model).state_dict().items():
                torch.testing.assert_close(results[head]["weights"][name], weight, rtol=1e-3, atol=near)
            log_probs = model(x).detach()
            # sums in another order may swap two neighbours that are equally far
            assert (results[head]["log_probs"] - log_probs).abs().mean() < 0.01, head
            assert (results[head]["log_probs"].argmax(1) == log_probs.argmax(1)).double().mean() > 0.99, head
    first, *others = [torch.load(tmp_path / f"{rank}.pt", weights_only=True)["gated"] for rank in range(world)]
    assert any("projector" in name and "running_var" in name for name in first)
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(other[name], tensor), name
    again = ShardedMemory(8, 5)
    again.load(tmp_path / "memory.safetensors")  # written by several, read by one
    assert len(again) == len(memory)
    assert torch.equal(again.neighbors(x, 3).ids, memory.neighbors(x, 3).ids)
    written = nnheads.load(tmp_path / "models" / "nngk", backbone=network())
    assert len(written.head.memory) == 203


@pytest.mark.slow
def test_a_run_on_a_stream_by_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["run", "split-digits", "--head", "nngk", "--epochs", "1", "--share", "0.3", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={_free_port()}"]
    command = [*launcher, "-m", "nnheads", *arguments, "--no-plots", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert results["processes"] == 2
    assert results["accuracy"] > 0.3
    assert done.stdout.count("accuracy") == 1
    assert (out / "model" / "head.json").is_file()


def test_one_process_shares_nothing_and_mistakes_are_named(tmp_path: Path) -> None:
    assert not distributed.join()
    assert distributed.is_main()
    with distributed.data_parallel():
        distributed.refuse("nothing")
    (tmp_path / "other").write_text("no tensors")
    memory = sharded()
    for path in (tmp_path / "other", tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="ShardedMemory"):
            memory.load(path)
    memory.save(tmp_path / "held")
    with pytest.raises(CheckpointError, match="8 wide"):
        ShardedMemory(9, 5).load(tmp_path / "held")
    with pytest.raises(ConfigError, match="k must be"):
        memory.search(samples()[0], 0)


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
