"""Records the order in which a backward pass computes the gradients of parameters."""

from collections.abc import Callable

from torch import Tensor, nn


def gradient_order(model: nn.Module, compute_loss: Callable[[], Tensor]) -> list[str]:
    """Returns the names of the parameters in the order in which `compute_loss().backward()` completes their gradients.

    ZeRO-2 puts gradients one after another into a buffer as they come and adds up the buffers of the ranks. So an order
    that depends on the samples adds a rank's gradient of one parameter to another rank's gradient of another.
    """
    order: list[str] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        for name, parameter in model.named_parameters()
    ]
    compute_loss().backward()
    for hook in hooks:
        hook.remove()
    return order
