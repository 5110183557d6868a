"""Faults that need processes, threads or tensor subclasses: fork, memory, DDP, subclasses."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, Case, make_inputs


def _python(code: str, *args: str, timeout: int = 240, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@pytest.mark.usefixtures("compiled_library")
def test_fork_after_the_first_call():
    """The child of a process that has used its thread pool computes the same and does not hang."""
    _python(
        """
        import os, torch, mmfast
        torch.set_num_threads(2)
        q = torch.randn(8, 4, 64, 32, requires_grad=True)
        with mmfast.use_backend("cpu"):
            def both():
                out = mmfast.cross_attention(q, q, q)
                return out, torch.autograd.grad(out.square().sum(), q)[0]
            expected = both()
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)  # torch's own advice for a forked child
                same = all(torch.equal(a, b) for a, b in zip(both(), expected))
                os._exit(0 if same else 3)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, status
        """,
        timeout=60,
    )


@pytest.mark.usefixtures("compiled_library")
def test_forked_data_loader_workers():
    _python(
        """
        import torch, mmfast

        class Items(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                q = torch.full((2, 5, 16), float(index))
                return mmfast.cross_attention(q[None], q[None], q[None])[0]

        q = torch.randn(4, 2, 64, 16)
        mmfast.cross_attention(q, q, q)
        loader = torch.utils.data.DataLoader(
            Items(), batch_size=4, num_workers=2, multiprocessing_context="fork"
        )
        got = torch.cat(list(loader))
        assert torch.allclose(got[:, 0, 0, 0], torch.arange(8.0)), got[:, 0, 0, 0]
        """,
        timeout=120,
    )


@pytest.mark.usefixtures("compiled_library")
def test_thread_limits_are_obeyed():
    """No threads beyond torch's own: one thread asked for is one thread running."""
    out = _python(
        """
        import os, torch, mmfast
        torch.set_num_threads(1)
        q = torch.randn(8, 8, 128, 64, requires_grad=True)
        with mmfast.use_backend("cpu"):
            mmfast.cross_attention(q, q, q)
            before = len(os.listdir("/proc/self/task"))
            mmfast.cross_attention(q, q, q).sum().backward()
            after = len(os.listdir("/proc/self/task"))
        files = {line.split("/")[-1] for line in open("/proc/self/maps").read().splitlines()}
        runtimes = {name for name in files if "omp" in name}
        print(before, after, len(runtimes))
        """,
        OMP_NUM_THREADS="1",
    )
    before, after, runtimes = map(int, out.split())
    # The autograd engine may start its own device thread; no pool appears.
    assert after <= before + 1
    assert runtimes <= 1, "a second OpenMP runtime was loaded"


@pytest.mark.usefixtures("compiled_library")
def test_memory_is_linear():
    """N = M = 8192: eager holds a 256 MiB score matrix a head, three of them in the backward."""
    out = _python(
        """
        import torch, mmfast

        def peak():
            status = open("/proc/self/status").read()
            return int(status.split("VmHWM:")[1].split()[0]) / 1024

        def reset():
            open("/proc/self/clear_refs", "w").write("5")
            return peak()

        q = torch.randn(1, 1, 8192, 64, requires_grad=True)
        small = q.detach()[:, :, :256].requires_grad_()
        with mmfast.use_backend("cpu"):
            mmfast.cross_attention(small, small, small).sum().backward()
            start = reset()
            with torch.no_grad():
                mmfast.cross_attention(q, q, q)
            forward = peak() - start
            mmfast.cross_attention(q, q, q).sum().backward()
            print(forward, peak() - start)
        """,
        OMP_NUM_THREADS="1",
    )
    forward, both = map(float, out.split())
    tensor = 8192 * 64 * 4 / 2**20  # 2 MiB
    assert forward < 8 * tensor, f"forward took {forward:.1f} MiB"
    assert both < 16 * tensor, f"forward and backward took {both:.1f} MiB"


def test_concurrent_calls_from_python_threads(backend):
    """Four threads with problems of their own; nothing is shared between calls."""
    problems = [make_inputs(CROSS_ATTENTION["results_everything"], seed=i) for i in range(4)]
    calls = [
        (lambda p=p: mmfast.cross_attention(p.q, p.k, p.v, kv_lens=p.options["kv_lens"]))
        for p in problems
    ]
    expected = [call() for call in calls]
    wrong = []

    def work(index):
        for _ in range(20):
            if not torch.equal(calls[index](), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["lens", "results_everything"])
def test_two_tensor_subclass(name, backend):
    """A subclass that runs every op on two tensors gets the plain results in both, forward."""
    inputs = make_inputs(CROSS_ATTENTION[name], torch.float32)
    options = {k: v for k, v in inputs.options.items() if k != "dropout_p"}
    plain = mmfast.cross_attention(inputs.q, inputs.k, inputs.v, **options)
    two = mmfast.cross_attention(
        *(
            TwoTensor(t.contiguous(), t.contiguous().clone())
            for t in (inputs.q, inputs.k, inputs.v)
        ),
        **{k: TwoTensor(v, v.clone()) if torch.is_tensor(v) else v for k, v in options.items()},
    )
    pairs = zip(plain, two, strict=True) if isinstance(plain, tuple) else [(plain, two)]
    for expected, got in pairs:
        if expected is not None:
            assert isinstance(got, TwoTensor)
            torch.testing.assert_close(got.a, expected)
            torch.testing.assert_close(got.b, expected)


def test_gradients_of_a_subclass(backend):
    inputs = make_inputs(Case("subclass", 2, 2, 5, 7, 8, kv_lens=(7, 2)), torch.float32)
    plain = tolerance.run(mmfast.cross_attention, inputs)
    q, k, v = (TwoTensor(t, t.clone()).requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = mmfast.cross_attention(q, k, v, **inputs.options)
    grads = torch.autograd.grad(out, (q, k, v), TwoTensor(inputs.dout, inputs.dout.clone()))
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        torch.testing.assert_close(grad.a, plain[name])
        torch.testing.assert_close(grad.b, plain[name])


_DDP = """
import os, sys, torch, mmfast
import torch.distributed as dist

class Joint(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv = torch.nn.Linear(8, 16), torch.nn.Linear(6, 32)
        self.gate = torch.nn.Linear(8, 2)

    def forward(self, x, context, lens):
        q = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, 2, 8)).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return mmfast.cross_attention(q, k, v, kv_lens=lens, gate=self.gate(x))

def data():
    torch.manual_seed(1)
    return torch.randn(4, 5, 8), torch.randn(4, 7, 6), torch.tensor([7, 0, 3, 5])

def main(rank, folder):
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Joint()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    mine = [t[2 * rank:2 * rank + 2] for t in data()]
    parallel(*mine).square().mean().backward()
    torch.manual_seed(0)
    alone = Joint()
    alone(*data()).square().mean().backward()
    for a, b in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    dist.destroy_process_group()

main(int(sys.argv[1]), sys.argv[2])
"""


def test_two_ranks_of_ddp(tmp_path):
    """Ragged and missing context on both ranks: the gradients are those of one process."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _DDP, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors[-4000:]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()


def test_dtensors_go_through_local_map(tmp_path):
    """Without it a call with a DTensor is an error, never a result of one rank's part alone."""
    _python(
        """
        import sys, torch, mmfast
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
        from torch.distributed.tensor.experimental import local_map

        meeting = f"file://{sys.argv[1]}/rendezvous"
        dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
        mesh, batch = init_device_mesh("cpu", (1,)), [Shard(0)]
        plain = torch.randn(2, 2, 3, 4)
        q = distribute_tensor(plain, mesh, batch)
        try:
            mmfast.cross_attention(q, q, q)
        except (NotImplementedError, RuntimeError):
            pass
        else:
            raise AssertionError("a DTensor was taken without a sharding rule")
        parts = local_map(
            mmfast.cross_attention, out_placements=batch, in_placements=(batch,) * 3,
            device_mesh=mesh,
        )
        out = parts(q, q, q)
        assert isinstance(out, DTensor)
        torch.testing.assert_close(out.to_local(), mmfast.cross_attention(plain, plain, plain))
        dist.destroy_process_group()
        """,
        str(tmp_path),
    )
