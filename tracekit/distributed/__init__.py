"""Past one process: harvests by several, models over several ranks, blocks that run elsewhere.

Blocks run on a model in another process, on another machine, on a Ray cluster:

    # where the model is                       # where you are
    tracekit serve gpt2                        host = tracekit.connect("127.0.0.1:6151", key)
                                               with host.trace("Hello") as tracer:
                                                   h = host.model.transformer.h[3].output
                                               print(h.shape)

What is sent is the text of the block and the values it uses; what it binds comes back, and so do
the changes of lists, dicts and tensors that it was given. Whoever may use a host may run code
on it.
"""

from tracekit.distributed.client import SocketHost, connect
from tracekit.distributed.host import ModelHost
from tracekit.distributed.local import LocalHost
from tracekit.distributed.on_ray import RayHost, serve_on_ray
from tracekit.distributed.server import Server, serve

__all__ = [
    "LocalHost",
    "ModelHost",
    "RayHost",
    "Server",
    "SocketHost",
    "connect",
    "serve",
    "serve_on_ray",
]
