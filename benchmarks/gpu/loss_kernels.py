"""Which Triton kernels torch.compile makes of a chunk of the loss for a GPU, counted on a machine without one.

    uv run python benchmarks/gpu/loss_kernels.py            1 kernel: softcap, softmax, loss and gradient in bf16

The code is traced on CPU, its graph is moved to a pretended H100, and Inductor generates the kernels; nothing is
compiled or run. It reaches into Inductor, so another version of torch may break it (written for torch 2.15).
"""

import contextlib
import re
from types import SimpleNamespace
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from chattrain.loss import _losses_and_gradient

ROWS, VOCAB_SIZE = 4096, 65_536
CUDA = torch.device("cuda:0")
LIMITS = {"multi_processor_count": 132, "regs_per_multiprocessor": 65_536, "max_threads_per_multi_processor": 2_048}
GPU = SimpleNamespace(
    major=9, minor=0, name="H100", warp_size=32, total_memory=80 << 30, L2_cache_size=50 << 20, **LIMITS
)
PROPERTIES = DeviceProperties(type="cuda", index=0, cc=90, major=9, warp_size=32, **LIMITS)


@contextlib.contextmanager
def pretended_gpu():
    answers = {"is_available": True, "current_device": 0, "device_count": 1, "_lazy_init": None}
    answers |= {"get_device_capability": (9, 0), "get_device_properties": GPU}
    with contextlib.ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, answer=answer: answer))
        patches.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: ""))
        patches.enter_context(mock.patch.object(DeviceProperties, "create", staticmethod(lambda device: PROPERTIES)))
        for name, answer in (("get_device_properties", GPU), ("current_device", 0)):
            stub = staticmethod(lambda *_, answer=answer: answer)
            patches.enter_context(mock.patch.object(CudaInterface.Worker, name, stub))
        yield


def kernels(dtype: torch.dtype) -> list[str]:
    """Names of the Triton kernels for logits [ROWS, VOCAB_SIZE] of this dtype."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with pretended_gpu(), mode:
        logits, targets = torch.empty(ROWS, VOCAB_SIZE, dtype=dtype), torch.empty(ROWS, dtype=torch.int64)
        traced = torch.func.functionalize(lambda logits, targets: _losses_and_gradient(logits, targets, None))
        graph = make_fx(traced, decomposition_table=select_decomp_table())(logits, targets)
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                node.meta["val"] = FakeTensor(mode, meta, CUDA)
        graph.recompile()
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        lowering = GraphLowering(graph, example_inputs=inputs)
        handlers = V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), V.set_fake_mode(mode)
        with contextlib.ExitStack() as stack:
            for handler in (*handlers, V.set_debug_handler(mock.MagicMock())):
                stack.enter_context(handler)
            lowering.run(*inputs)
            code = lowering.codegen()[0].value
    return re.findall(r"def (triton_\w+)\(", code)


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float32):
        names = kernels(dtype)
        print(f"{dtype}: {len(names)} kernel{'s' if len(names) > 1 else ''} ({', '.join(names)})")
