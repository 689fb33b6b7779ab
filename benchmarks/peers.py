"""Ways to have a formula computed: PyTorch as it is, its compiler, ONNX Runtime.

Each takes what to compute and gives a ``Build``: called with the arguments of one case, it does
all that need not be timed (compiling, freezing, packing) and returns the call that is.
"""

import contextlib
import functools
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)

from benchmarks.timing import sample, wait_for_sleep, warm_up
from mylayers import training_step

Call = Callable[[], Tensor]
Build = Callable[..., Call]
# A step of training, by the loss of a call's result and a target.
Learn = Callable[[Call, Tensor, torch.optim.Optimizer], object]
Bound = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # what is called, and with what
Bind = Callable[..., Bound]
_OnnxLayer = tuple[Tensor, Tensor, str | None]  # weight (in_units, units), bias, activation


def operator(function: Callable[..., Tensor]) -> Bind:
    """A function of all arguments."""

    def bind(*arguments: Tensor, **options: Any) -> Bound:
        return functools.partial(function, **options) if options else function, arguments

    return bind


def module(make: Callable[..., nn.Module]) -> Bind:
    """A module, made from all arguments but the first, that is called with the first."""

    def bind(x: Tensor, *parameters: Tensor, **options: Any) -> Bound:
        return make(*parameters, **options).eval(), (x,)

    return bind


def eager(bind: Bind) -> Build:
    """As it is."""

    def build(*arguments: Tensor, **options: Any) -> Call:
        function, inputs = bind(*arguments, **options)
        return functools.partial(function, *inputs)

    return build


# A sum, since the gradients of a mean over many elements underflow in float16.
_SQUARES = nn.MSELoss(reduction="sum")


def by_autograd(call: Call, target: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step as every network is trained."""
    optimizer.zero_grad()
    F.mse_loss(call(), target, reduction="sum").backward()
    optimizer.step()


def in_one_call(
    call: functools.partial[Tensor], target: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """A step of an eager call of a module, by ``mylayers.training_step``."""
    training_step(call.func, _SQUARES, optimizer, *call.args, target)  # type: ignore[arg-type]


def compiled(bind: Bind, *, freezing: bool = False, **settings: Any) -> Build:
    """Through ``torch.compile``, for the one shape and number of threads of the case.

    Args:
        bind: what to compile.
        freezing: whether the parameters of a module are constants, laid out as suits the kernel.
        settings: of ``torch.compile``.
    """

    def build(*arguments: Tensor, **options: Any) -> Call:
        function, inputs = bind(*arguments, **options)
        with _quiet():
            import torch._inductor.config as inductor

            call = functools.partial(torch.compile(function, dynamic=False, **settings), *inputs)
            with inductor.patch(freezing=freezing):
                # The first call compiles; a gradient is compiled when it is first asked for.
                output = call()
                if output.requires_grad:
                    wanted = [argument for argument in arguments if argument.requires_grad]
                    torch.autograd.grad(output, wanted, torch.ones_like(output))
        return call

    return build


def onnx_runtime(x: Tensor, weight: Tensor, bias: Tensor) -> Call:
    """``relu(x @ weight + bias)`` in ONNX Runtime, weight and bias being constants."""
    return _onnx_call(x, [(weight, bias, "Relu")])


def onnx_network(x: Tensor, *parameters: Tensor, activation: str) -> Call:
    """A network in ONNX Runtime, its weights ``(units, in_units)`` and biases being constants."""
    weights = [weight.t().contiguous() for weight in parameters[::2]]
    operators = [*[activation.capitalize()] * (len(weights) - 1), None]
    return _onnx_call(x, list(zip(weights, parameters[1::2], operators, strict=True)))


def numpy_network(x: Tensor, *parameters: Tensor, activation: str) -> Call:
    """A network in NumPy, its BLAS on as many threads as PyTorch."""
    import numpy as np
    import threadpoolctl

    threadpoolctl.threadpool_limits(torch.get_num_threads(), user_api="blas")
    array = x.numpy()
    arrays = [parameter.numpy() for parameter in parameters]
    *hidden, last = zip(arrays[::2], arrays[1::2], strict=True)

    def relu(values: Any) -> None:
        np.maximum(values, 0, out=values)

    def tanh(values: Any) -> None:
        np.tanh(values, out=values)

    act = {"relu": relu, "tanh": tanh}[activation]

    def call() -> Tensor:
        values = array
        for weight, bias in hidden:
            values = values @ weight.T
            values += bias
            act(values)
        values = values @ last[0].T
        values += last[1]
        return torch.from_numpy(values)

    return call


def _onnx_call(x: Tensor, layers: Sequence[_OnnxLayer]) -> Call:
    """Layers in ONNX Runtime.

    The output goes to memory of PyTorch's or of its own, whichever takes less time.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors
    model, element_type = _onnx_model(x, layers)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    array, shape = x.numpy(), (x.shape[0], layers[-1][0].shape[1])
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, element_type, x.shape, x.data_ptr())

    def into_ours() -> Tensor:
        output = torch.empty(shape, dtype=x.dtype)
        binding.bind_output("y", "cpu", 0, element_type, shape, output.data_ptr())
        session.run_with_iobinding(binding)
        return output

    def into_its_own() -> Tensor:
        return torch.from_numpy(session.run(None, {"x": array})[0])

    def seconds(call: Call) -> float:
        warm_up(call)
        return min(sample(call, 3) for _ in range(3))

    wait_for_sleep()
    return min(into_ours, into_its_own, key=seconds)


def _onnx_model(x: Tensor, layers: Sequence[_OnnxLayer]) -> tuple[bytes, int]:
    """The serialised graph, and ONNX's number for the dtype of ``x``."""
    from onnx import TensorProto, helper

    element_type = {
        torch.float32: TensorProto.FLOAT,
        torch.float64: TensorProto.DOUBLE,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.float16: TensorProto.FLOAT16,
    }[x.dtype]
    constants, steps = [], []
    for n, (weight, bias, activation) in enumerate(layers):
        for name, tensor in ((f"weight{n}", weight), (f"bias{n}", bias)):
            data = tensor.view(torch.uint8).numpy().tobytes()
            constants.append(helper.make_tensor(name, element_type, tensor.shape, data, raw=True))
        steps += [("MatMul", [f"weight{n}"]), ("Add", [f"bias{n}"])]
        steps += [(activation, [])] if activation else []
    values = ["x", *(f"value{n}" for n in range(1, len(steps))), "y"]
    nodes = [
        helper.make_node(step, [before, *constant], [after])
        for (step, constant), (before, after) in zip(steps, itertools.pairwise(values), strict=True)
    ]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", element_type, x.shape)],
        [helper.make_tensor_value_info("y", element_type, (x.shape[0], layers[-1][0].shape[1]))],
        constants,
    )
    # Not the newest, which an ONNX Runtime of last year would refuse.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString(), element_type


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No tables of autotuning on stderr, no warnings of the compiler's about its own code."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
