"""Turn the weights of a BERT sentence encoder into an ONNX graph of fused operators, without torch.

In: a sentence-transformers folder (BERT, mean or CLS pooling). Out: a folder with `model.onnx`,
`model.onnx.data` and a manifest. Texts run one behind the other without padding: the graph takes
`input_ids` and `positions` (1, tokens) int32, `attention_bias` (1, 1, tokens, tokens) float32, 0
between tokens of one text and very negative elsewhere, and `pooling` (batch, tokens) float32, the
weights of each text's tokens; it gives `embedding` (batch, dim) float32, L2-normalised. Weights lie
in a file of their own, so that a reader maps them into memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

GRAPH_VERSION = 2
"""Rises when the graph changes, so that cached ones are rebuilt."""
GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
MANIFEST_FILE = "manifest.json"

_ALIGNMENT_BYTES = 4096
_OPSET = 17


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What the folder says about its network."""

    num_layers: int
    num_heads: int
    dim: int
    layer_norm_eps: float
    pooling: str
    """`mean` or `cls`."""


def read_spec(folder: Path) -> EncoderSpec:
    """Read the network's shape from its configuration files.

    Raises:
        ConfigError: If the network is not one that this module can build.
    """
    config = json.loads((folder / "config.json").read_text())
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ConfigError(
                f"embedder.backend 'onnx' needs {key} {value!r}, the model has {config[key]!r}; "
                "set embedder.backend: torch"
            )
    modules = [
        m["type"].rpartition(".")[2] for m in json.loads((folder / "modules.json").read_text())
    ]
    if modules[:2] != ["Transformer", "Pooling"] or modules[2:] not in ([], ["Normalize"]):
        raise ConfigError(
            f"embedder.backend 'onnx' cannot build modules {modules!r}; set embedder.backend: torch"
        )
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    modes = [
        key.removeprefix("pooling_mode_")
        for key, on in pooling.items()
        if key.startswith("pooling_mode_") and on
    ]
    names = {"mean_tokens": "mean", "cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise ConfigError(
            f"embedder.backend 'onnx' cannot build pooling {modes!r}; set embedder.backend: torch"
        )
    return EncoderSpec(
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        dim=config["hidden_size"],
        layer_norm_eps=config["layer_norm_eps"],
        pooling=names[modes[0]],
    )


def source_key(folder: Path) -> str:
    """Hash of everything the graph is made from; names its place in the cache."""
    digest = hashlib.sha256(f"graph {GRAPH_VERSION}".encode())
    for name in ("config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"):
        digest.update(_file_sha256(folder / name).encode())
    return digest.hexdigest()[:16]


def is_intact(export: Path) -> bool:
    """Whether an exported folder is complete and unchanged since it was written."""
    try:
        hashes: dict[str, str] = json.loads((export / MANIFEST_FILE).read_text())
        return set(hashes) == {GRAPH_FILE, WEIGHTS_FILE} and all(
            _file_sha256(export / name) == expected for name, expected in hashes.items()
        )
    except (OSError, ValueError, TypeError):
        return False


def export_encoder(folder: Path, export: Path) -> None:
    """Write the graph of the model in `folder` into the empty folder `export`, manifest last.

    Raises:
        ConfigError: If the network is not one that this module can build.
    """
    spec = read_spec(folder)
    with (export / WEIGHTS_FILE).open("wb") as weights_file:
        graph = _GraphWriter(weights_file)
        _build(graph, folder, spec)
    (export / GRAPH_FILE).write_bytes(graph.serialize(spec))
    hashes = {name: _file_sha256(export / name) for name in (GRAPH_FILE, WEIGHTS_FILE)}
    (export / MANIFEST_FILE).write_text(json.dumps(hashes))


@dataclass(slots=True)
class _GraphWriter:
    """Collects nodes; streams weights to a file as they come, so that few are in memory at once."""

    weights_file: BinaryIO
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)

    def weight(self, name: str, value: NDArray[np.float32]) -> str:
        """Store a weight outside the graph and return its name."""
        from onnx import TensorProto

        self.weights_file.write(b"\0" * (-self.weights_file.tell() % _ALIGNMENT_BYTES))
        offset = self.weights_file.tell()
        self.weights_file.write(np.ascontiguousarray(value, dtype="<f4").data)
        tensor = TensorProto(
            name=name,
            data_type=TensorProto.FLOAT,
            dims=value.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, text in (
            ("location", WEIGHTS_FILE),
            ("offset", str(offset)),
            ("length", str(value.nbytes)),
        ):
            tensor.external_data.add(key=key, value=text)
        self.tensors.append(tensor)
        return name

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Store a small tensor inside the graph and return its name."""
        from onnx import numpy_helper

        self.tensors.append(numpy_helper.from_array(value, name))
        return name

    def node(
        self, op: str, inputs: list[str], output: str, *, fused: bool = False, **attributes: Any
    ) -> str:
        """Add an operator (`fused`: one of onnxruntime's own) and return its output's name."""
        from onnx import helper

        domain = "com.microsoft" if fused else ""
        self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))
        return output

    def split(self, source: str, outputs: list[str], width: int) -> list[str]:
        """Cut the last axis into pieces of one width and return their names."""
        from onnx import helper

        if not any(tensor.name == "split_widths" for tensor in self.tensors):
            self.constant("split_widths", np.full(len(outputs), width, np.int64))
        self.nodes.append(helper.make_node("Split", [source, "split_widths"], outputs, axis=-1))
        return outputs

    def serialize(self, spec: EncoderSpec) -> bytes:
        """The whole graph as ONNX bytes."""
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self.nodes,
            "encoder",
            inputs=[
                helper.make_tensor_value_info("input_ids", TensorProto.INT32, [1, "tokens"]),
                helper.make_tensor_value_info("positions", TensorProto.INT32, [1, "tokens"]),
                helper.make_tensor_value_info(
                    "attention_bias", TensorProto.FLOAT, [1, 1, "tokens", "tokens"]
                ),
                helper.make_tensor_value_info("pooling", TensorProto.FLOAT, ["batch", "tokens"]),
            ],
            outputs=[
                helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", spec.dim])
            ],
            initializer=self.tensors,
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return bytes(model.SerializeToString())


def _build(graph: _GraphWriter, folder: Path, spec: EncoderSpec) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        prefix = "bert." if any(key.startswith("bert.") for key in weights.keys()) else ""  # noqa: SIM118

        def load(name: str) -> NDArray[np.float32]:
            value: NDArray[np.float32] = weights.get_tensor(prefix + name).astype(
                np.float32, copy=False
            )
            return value

        def norm(name: str) -> list[str]:
            parts = ("weight", "bias")
            return [
                graph.weight(f"{name}.norm_{part}", load(f"{name}.LayerNorm.{part}"))
                for part in parts
            ]

        # Every text is one segment, so its embedding is a constant that joins the positions.
        positions = (
            load("embeddings.position_embeddings.weight")
            + load("embeddings.token_type_embeddings.weight")[0]
        )
        words = graph.weight("words", load("embeddings.word_embeddings.weight"))
        inputs = [
            "input_ids",
            "",
            words,
            graph.weight("position_embeddings", positions),
            "",
            *norm("embeddings"),
            "",
            "positions",
        ]
        eps = spec.layer_norm_eps
        graph.node("EmbedLayerNormalization", inputs, "hidden", fused=True, epsilon=eps)
        graph.nodes[-1].output.append("unused_mask_index")
        hidden = "hidden"
        for index in range(spec.num_layers):
            layer = f"encoder.layer.{index}"
            parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
            joined = graph.weight(
                f"{layer}.qkv", np.hstack([load(f"{part}.weight").T for part in parts])
            )
            product = graph.node("MatMul", [hidden, joined], f"{layer}.qkv_product")
            query_key_value = graph.split(product, parts, spec.dim)
            bias = graph.weight(
                f"{layer}.qkv_bias", np.hstack([load(f"{part}.bias") for part in parts])
            )
            attention = graph.node(
                "MultiHeadAttention",
                [*query_key_value, bias, "", "attention_bias"],
                f"{layer}.attended",
                fused=True,
                num_heads=spec.num_heads,
            )

            def dense(source: str, name: str) -> tuple[str, str]:
                """A matrix product, and the bias that the next fused operator adds."""
                product = graph.node(
                    "MatMul",
                    [source, graph.weight(f"{name}.dense_weight", load(f"{name}.dense.weight").T)],
                    f"{name}.product",
                )
                return product, graph.weight(f"{name}.dense_bias", load(f"{name}.dense.bias"))

            def add_and_norm(product: str, bias: str, residual: str, name: str) -> str:
                return graph.node(
                    "SkipLayerNormalization",
                    [product, residual, *norm(name), bias],
                    f"{name}.normed",
                    fused=True,
                    epsilon=eps,
                )

            output = f"{layer}.attention.output"
            hidden = add_and_norm(*dense(attention, output), hidden, output)
            inner = graph.node(
                "BiasGelu", [*dense(hidden, f"{layer}.intermediate")], f"{layer}.inner", fused=True
            )
            hidden = add_and_norm(*dense(inner, f"{layer}.output"), hidden, f"{layer}.output")
    # One row of hidden states per token; a mean's divisor falls out of the normalisation.
    rows = graph.node(
        "Squeeze", [hidden, graph.constant("first_axis", np.array([0], np.int64))], "rows"
    )
    pooled = graph.node("MatMul", ["pooling", rows], "pooled")
    graph.node("LpNormalization", [pooled], "embedding", axis=-1, p=2)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
