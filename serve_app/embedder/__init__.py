"""Text in, unit vectors out: the sentence encoder, its batching, and the deployment around them.

Nothing here imports Ray, so tools and training use the same encoder.
"""

from serve_app.embedder.batcher import MicroBatcher
from serve_app.embedder.deployment import Embedder
from serve_app.embedder.encoder import (
    Network,
    TextEncoder,
    TokenIds,
    cached_graph,
    find_model,
    runs_of,
)
from serve_app.embedder.static import Tokens, TokenTable

__all__ = [
    "Embedder",
    "MicroBatcher",
    "Network",
    "TextEncoder",
    "TokenIds",
    "TokenTable",
    "Tokens",
    "cached_graph",
    "find_model",
    "runs_of",
]
