"""How a checkpoint stores its weights: which scheme, which tensors belong together, and what they stand for; no value is read here.

A scheme is recognised tensor by tensor, from dtypes and from the tensors that lie beside a weight, because most checkpoints mix several.
What tensors do not show (bits, groups, blocks, conventions) comes from the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reapkit.checkpoint import CONFIG_NAME, Checkpoint, quantization_of, read_small, text_section
from reapkit.errors import CheckpointError, UnsupportedError, reason_of
from reapkit.tensors import DTYPE_BITS, TensorInfo, brief, parse_json

QUANT_CONFIG_NAME = "hf_quant_config.json"
PLAIN_DTYPES = frozenset({"F16", "BF16", "F32"})
# Bytes that are exponents: 2 to the power of (byte - 127).
EXPONENT_DTYPES = frozenset({"U8", "F8_E8M0"})
# Rows and columns of a weight that share a scale, where products are computed in FP8: as in the releases of MiniMax and DeepSeek.
FP8_BLOCK = 128
# Bits of a packed value where nothing says them, for counting only.
ASSUMED_BITS = 4
HINT = (
    "observe a sibling checkpoint of the same model in bf16, FP8, INT4 or INT8 (compressed-tensors, AWQ, GPTQ), NVFP4, MXFP4 or MXFP8: "
    "its routers are the same, so its plan fits this one"
)

# Tensors that only serve another one's dequantisation, in the schemes of public releases. Erring on the short side counts scales as
# parameters, which is less than 1 %; on the long side it would lose weights.
_COMPANION = re.compile(
    r".*(_scale_inv|\.weight_scale(_2)?|\.(weight|input)_global_scale|\.(input|output|q|k|v|kv)_scale|[._]activation_scale"
    r"|\.weight_(shape|zero_point|g_idx)|\.(qzeros|scales|g_idx)|_proj_scales"
    r"|\.weight\.(nested_)?(absmax|quant_map)|\.weight\.quant_state\..*|\.SCB)"
)
# Values of these widths never straddle a byte; packers disagree on those that do.
_BITS = (2, 4, 8)
_COMPRESSED_FORMATS = {
    "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized", "mxfp8-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "pack-quantized",
}  # fmt: skip
_MODELOPT_ALGORITHMS = {
    "FP8": "FP8", "FP8_PER_CHANNEL_PER_TOKEN": "FP8", "NVFP4": "NVFP4", "W4A16_NVFP4": "NVFP4", "MXFP8": "MXFP8",
    "MIXED_PRECISION": "mixed precision",
}  # fmt: skip

# Repeats of a pattern: how often makes one open, and how many a pattern may have. Published ones have up to five.
_OPEN_REPEAT = 8
_MOST_REPEATS = 8

Scheme = Literal["scaled", "fp4", "int", "awq", "gptq"]


@dataclass(frozen=True)
class Rule:
    """What a config says about the modules that it names.

    Attributes:
        targets: names of modules, patterns after `re:`, or classes such as `Linear`; empty for all that no other rule names.
        bits: of a value; None where the config does not say.
        integer: whether values are integers.
        group_size: values of a row that share a scale; None where the config does not say, -1 for the whole row.
        block: rows and columns that share a scale, where they do.
        symmetric: whether integers of compressed-tensors have no zero points.
    """

    targets: tuple[str, ...] = ()
    bits: int | None = None
    integer: bool = False
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True

    def names(self, module: str) -> bool:
        """Whether the rule names this module itself, not only its class."""
        return any(
            re.match(target[3:], module) if target.startswith("re:") else target == module for target in self.targets
        )

    @property
    def is_general(self) -> bool:
        """Whether it can hold for a module that no rule names: classes begin with a capital, modules with a small letter."""
        return not self.targets or any(target.isidentifier() and target[0].isupper() for target in self.targets)


@dataclass(frozen=True)
class Recipe:
    """How one quantised tensor becomes values.

    Attributes:
        scheme: which routine computes them.
        name: of the tensor once dequantised.
        shape: likewise; [rows, columns], or [experts, rows, columns].
        scale: the scales, one of them for each part of a grid.
        grid: the scales' own shape in three dimensions, the first of them for experts, where every expert has scales of its own.
        block: rows and columns that share a scale.
        bits: of a packed value.
        factor: one more scale for the whole tensor or each expert.
        divides: whether `factor` divides.
        zeros: packed zero points.
        zero_offset: what is to be added to a stored zero point.
        order: group number of every column, where columns are not in the order of their groups.
        stated: a tensor that holds the shape.
        transposed: whether rows and columns change places at the end.
    """

    scheme: Scheme
    name: str
    shape: tuple[int, ...]
    scale: TensorInfo
    grid: tuple[int, ...]
    block: tuple[int, int]
    bits: int = 8
    factor: TensorInfo | None = None
    divides: bool = False
    zeros: TensorInfo | None = None
    zero_offset: int = 0
    order: TensorInfo | None = None
    stated: TensorInfo | None = None
    transposed: bool = False

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """The tensors that are needed besides the quantised one."""
        every = (self.scale, self.factor, self.zeros, self.order, self.stated)
        return tuple(info for info in every if info is not None)


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores its weights.

    Attributes:
        name: for people.
        obstacle: why its values cannot be computed, as a sentence; None where they can.
        quantized: whether companions and packed weights are to be expected.
        method: `quant_method` of the config.
        rules: what the config says about which modules, the most particular first.
        zero_offset: what is to be added to a stored zero point.
    """

    name: str
    obstacle: str | None = None
    quantized: bool = False
    method: str = ""
    rules: tuple[Rule, ...] = ()
    zero_offset: int = 0

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale in every quantised weight; None where that is not said for all of them."""
        return self.rules[0].block if len(self.rules) == 1 and not self.rules[0].targets else None

    def is_companion(self, name: str) -> bool:
        """Whether a tensor only serves another one's dequantisation."""
        return self.quantized and _COMPANION.fullmatch(name) is not None

    def packed_bits(self, name: str) -> int | None:
        """Bits of a value in the tensor of this name, as the config says it; None where it does not."""
        rule = self._rule(name)
        return rule.bits if rule is not None else None

    def num_values(self, info: TensorInfo) -> int:
        """Parameters that a tensor stands for, padding of packed ones included; 0 for companions."""
        if self.is_companion(info.name):
            return 0
        if not self.quantized or info.dtype not in ("U8", "I32"):
            return info.num_elements
        # Where a byte can be computed with, it holds two values of FP4; a config may say 8 bits for other modules.
        bits = 4 if info.dtype == "U8" and self.obstacle is None else self.packed_bits(info.name) or ASSUMED_BITS
        return info.num_elements * DTYPE_BITS[info.dtype] // bits

    def companions(self, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[TensorInfo, ...]:
        """The tensors that are needed, besides its own bytes, to dequantise this one; empty where it is stored as it is.

        Raises:
            CheckpointError: a quantised weight lacks a companion, or one has the wrong shape.
            UnsupportedError: a dtype that the format does not explain, or values that cannot be computed.
        """
        recipe = self.recipe(info, tensors)
        return recipe.companions if recipe is not None else ()

    def decoded(self, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[str, tuple[int, ...]]:
        """Name and shape of a tensor once dequantised: `X.weight` for `X.weight_packed`; its own where it is stored as it is.

        Raises:
            CheckpointError, UnsupportedError: as in `companions`.
        """
        recipe = self.recipe(info, tensors)
        return (recipe.name, recipe.shape) if recipe is not None else (info.name, info.shape)

    def recipe(self, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Recipe | None:
        """How a tensor becomes values; None where it is stored as it is, or only serves another one.

        Raises:
            CheckpointError, UnsupportedError: as in `companions`.
        """
        if info.dtype in PLAIN_DTYPES or self.is_companion(info.name):
            return None
        if self.obstacle is not None:
            raise UnsupportedError(f"{info.name!r} cannot be dequantised: {self.obstacle}", hint=HINT)
        found = _Lookup(self, info, tensors, self._rule(info.name) or Rule())
        if not self.quantized:
            raise found.unexplained(info)
        if info.dtype == "I32" and info.name.endswith(".qweight") and self.method in ("awq", "gptq"):
            return _awq(found) if self.method == "awq" else _gptq(found)
        if info.name.endswith(".weight_packed") and info.dtype in ("I32", "U8"):
            return _compressed_int(found) if info.dtype == "I32" else _compressed_fp4(found)
        if info.name.endswith("_blocks") and info.dtype == "U8":
            return _mxfp4_blocks(found)
        if info.dtype == "U8" and self.method == "modelopt":
            return _modelopt_fp4(found)
        if info.dtype == "F8_E4M3" or (info.dtype == "I8" and found.rule.integer):
            return _scaled(found)
        raise found.unexplained(info)

    def _rule(self, name: str) -> Rule | None:
        module = name.rpartition(".")[0]
        return next(
            (rule for rule in self.rules if rule.names(module)), next((r for r in self.rules if r.is_general), None)
        )


# --- schemes, tensor by tensor


@dataclass(frozen=True)
class _Lookup:
    """One quantised tensor among the others, and what the config says about it."""

    format: Format
    info: TensorInfo
    tensors: Mapping[str, TensorInfo]
    rule: Rule

    @property
    def stem(self) -> str:
        """The name without its last word, and without the point in front of that."""
        return self.info.name.rpartition(".")[0]

    def need(self, name: str) -> TensorInfo:
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"{self.info.name!r} is {self.info.dtype} and has no {name!r}", hint="fetch the checkpoint again"
            )
        return found

    def unexplained(self, info: TensorInfo, what: str = "") -> UnsupportedError:
        return UnsupportedError(
            f"{what}{info.name!r} is {info.dtype} {list(info.shape)}, which the format {self.format.name!r} does not explain",
            hint=HINT,
        )

    def require_dtype(self, info: TensorInfo, allowed: frozenset[str] | set[str], what: str = "scale") -> None:
        if info.dtype not in allowed:
            raise self.unexplained(info, f"the {what} ")

    def require_shape(self, info: TensorInfo, shape: tuple[int, ...], of: str = "") -> None:
        if info.shape != shape:
            raise CheckpointError(
                f"{info.name!r} has the shape {list(info.shape)} where {list(self.info.shape)} {of}needs {list(shape)}"
            )

    def require_rank(self, *ranks: int) -> None:
        if len(self.info.shape) not in ranks:
            raise self.unexplained(self.info)

    def bits(self) -> int:
        if self.rule.bits not in _BITS:
            raise UnsupportedError(
                f"{CONFIG_NAME} does not say how many bits the values in {self.info.name!r} have", hint=HINT
            )
        return self.rule.bits

    def groups(self, columns: int, scale: TensorInfo, axis: int) -> int:
        """How many columns share a scale, by the config, else by the number of scales; checked against that number."""
        count, size = scale.shape[axis], self.rule.group_size
        if size is None:
            size = math.ceil(columns / max(count, 1))
        elif size == -1:
            size = columns
        if count != math.ceil(columns / size):
            raise CheckpointError(
                f"{scale.name!r} has {count} groups where {columns} values in groups of {size} need {math.ceil(columns / size)}"
            )
        return size

    def order(self, name: str, columns: int) -> TensorInfo | None:
        """The group of every column, where they are stored."""
        found = self.tensors.get(name)
        if found is not None:
            self.require_dtype(found, {"I32", "I64"}, "group number")
            self.require_shape(found, (columns,))
        return found

    def factor(self, name: str) -> TensorInfo:
        """One scale for the whole tensor, or one for each expert."""
        found = self.need(name)
        self.require_dtype(found, PLAIN_DTYPES)
        if found.num_elements != 1 and not (len(self.info.shape) == 3 and found.num_elements == self.info.shape[0]):
            raise CheckpointError(f"{found.name!r} has the shape {list(found.shape)} where one scale is expected")
        return found


def _scaled(found: _Lookup) -> Recipe:
    """FP8 or INT8 values times a scale per tensor, row, group of a row or block, `X` with `X_scale_inv` or `X_scale`.

    Scales that are exponents hold for groups of 32, unless the config says blocks.
    """
    info, rule = found.info, found.rule
    found.require_rank(2, 3)
    suffixes = ("_scale_inv", "_scale") if found.format.method in ("fp8", "mxfp8") else ("_scale", "_scale_inv")
    scale = next(
        (found.tensors[info.name + suffix] for suffix in suffixes if info.name + suffix in found.tensors), None
    ) or found.need(info.name + suffixes[0])
    found.require_dtype(scale, PLAIN_DTYPES | EXPONENT_DTYPES)
    if info.name + "_zero_point" in found.tensors:
        raise found.unexplained(found.tensors[info.name + "_zero_point"])
    *lead, rows, columns = info.shape
    if rule.block is not None:
        block, of = rule.block, f"in blocks of {list(rule.block)} "
    elif scale.num_elements == 1:
        return Recipe("scaled", info.name, info.shape, scale, (1, 1, 1), (max(rows, 1), max(columns, 1)))
    elif lead and scale.shape in {(*lead,), (*lead, 1), (*lead, 1, 1)}:
        return Recipe("scaled", info.name, info.shape, scale, (lead[0], 1, 1), (rows, columns))
    elif (size := 32 if scale.dtype in EXPONENT_DTYPES else rule.group_size) is not None and size > 0:
        block, of = (1, size), f"in groups of {size} "
    else:
        block, of = (1, max(columns, 1)), "with a scale per row "
        if scale.shape == (*lead, rows):
            return Recipe("scaled", info.name, info.shape, scale, (*_stack(lead), rows, 1), block)
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    found.require_shape(scale, (*lead, *grid), of)
    return Recipe("scaled", info.name, info.shape, scale, (*_stack(lead), *grid), block)


def _modelopt_fp4(found: _Lookup) -> Recipe:
    """NVFP4 as ModelOpt stores it: `X.weight` U8 [.., M, N/2], `weight_scale` F8_E4M3 [.., M, N/16], `weight_scale_2` F32."""
    name = found.info.name
    found.require_rank(2, 3)
    return _fp4(found, name, found.need(name + "_scale"), factor=found.factor(name + "_scale_2"))


def _compressed_fp4(found: _Lookup) -> Recipe:
    """NVFP4 and MXFP4 as compressed-tensors stores them: `X.weight_packed` U8 [.., M, N/2] with `weight_scale`.

    NVFP4 has F8_E4M3 scales and a `weight_global_scale` that divides, MXFP4 exponents alone.
    """
    found.require_rank(2, 3)
    name, scale = f"{found.stem}.weight", found.need(f"{found.stem}.weight_scale")
    if scale.dtype in EXPONENT_DTYPES:
        return _fp4(found, name, scale)
    return _fp4(found, name, scale, factor=found.factor(f"{found.stem}.weight_global_scale"), divides=True)


def _mxfp4_blocks(found: _Lookup) -> Recipe:
    """MXFP4 as gpt-oss stores it: `X_blocks` U8 [E, M, G, 16], `X_scales` U8 [E, M, G]; `X` is [E, 32 G, M]."""
    found.require_rank(4)
    name = found.info.name.removesuffix("_blocks")
    experts, rows, groups, width = found.info.shape
    if width != 16:
        raise found.unexplained(found.info)
    scale = found.need(name + "_scales")
    found.require_dtype(scale, EXPONENT_DTYPES)
    found.require_shape(scale, (experts, rows, groups))
    shape = (experts, groups * 32, rows)
    return Recipe("fp4", name, shape, scale, (experts, rows, groups), (1, 32), bits=4, transposed=True)


def _fp4(
    found: _Lookup, name: str, scale: TensorInfo, *, factor: TensorInfo | None = None, divides: bool = False
) -> Recipe:
    """Groups of 16 with F8_E4M3 scales where there is a factor, else of 32 with exponents."""
    size = 16 if factor is not None else 32
    found.require_dtype(scale, {"F8_E4M3"} if factor is not None else EXPONENT_DTYPES)
    *lead, rows, width = found.info.shape
    if width * 2 % size:
        raise found.unexplained(found.info)
    found.require_shape(scale, (*lead, rows, width * 2 // size), f"in groups of {size} ")
    grid = (*_stack(lead), *scale.shape[-2:])
    return Recipe("fp4", name, (*lead, rows, width * 2), scale, grid, (1, size), bits=4, factor=factor, divides=divides)


def _compressed_int(found: _Lookup) -> Recipe:
    """Integers as compressed-tensors packs them: `X.weight_packed` I32 [.., M, N bits/32] with `weight_scale` [.., M, N/group].

    Perhaps `weight_zero_point` I32 [.., M bits/32, N/group], `weight_g_idx` [N], `weight_shape` [M, N].
    """
    found.require_rank(2, 3)
    stem, bits = found.stem, found.bits()
    *lead, rows, width = found.info.shape
    columns = width * 32 // bits
    scale = found.need(f"{stem}.weight_scale")
    found.require_dtype(scale, PLAIN_DTYPES)
    if len(scale.shape) != len(found.info.shape):
        found.require_shape(scale, (*lead, rows, 1))
    size = found.rule.group_size
    if size is not None and size > 0:
        # The last word of a row may be padded; its groups are whole.
        exact = scale.shape[-1] * size
        columns = exact if columns - 32 // bits < exact <= columns else columns
    size = found.groups(columns, scale, -1)
    found.require_shape(scale, (*lead, rows, math.ceil(columns / size)), f"in groups of {size} ")
    zeros = None
    if not found.rule.symmetric:
        zeros = found.need(f"{stem}.weight_zero_point")
        found.require_dtype(zeros, {"I32"}, "zero point")
        found.require_shape(zeros, (*lead, math.ceil(rows * bits / 32), scale.shape[-1]))
    order = found.order(f"{stem}.weight_g_idx", columns)
    grid = (*_stack(lead), *scale.shape[-2:])
    stated = found.tensors.get(f"{stem}.weight_shape")
    return Recipe(
        "int", f"{stem}.weight", (*lead, rows, columns), scale, grid, (1, size), bits=bits, zeros=zeros, order=order, stated=stated
    )  # fmt: skip


def _awq(found: _Lookup) -> Recipe:
    """AWQ: `X.qweight` I32 [N, M/8], `qzeros` I32 [N/group, M/8], `scales` [N/group, M]; `X.weight` is [M, N]."""
    found.require_rank(2)
    columns, width = found.info.shape
    return _inputs_first(found, "awq", width * 32 // found.bits(), columns)


def _gptq(found: _Lookup) -> Recipe:
    """GPTQ: `X.qweight` I32 [N bits/32, M], `qzeros` I32 [N/group, M bits/32], `scales` [N/group, M], perhaps `g_idx` [N].

    `X.weight` is [M, N].
    """
    found.require_rank(2)
    depth, rows = found.info.shape
    columns = depth * 32 // found.bits()
    return _inputs_first(found, "gptq", rows, columns, order=found.order(f"{found.stem}.g_idx", columns))


def _inputs_first(
    found: _Lookup, scheme: Scheme, rows: int, columns: int, *, order: TensorInfo | None = None
) -> Recipe:
    """What AWQ and GPTQ share: scales and packed zero points that have a row for every group of inputs."""
    stem, bits = found.stem, found.bits()
    scale, zeros = found.need(f"{stem}.scales"), found.need(f"{stem}.qzeros")
    found.require_dtype(scale, PLAIN_DTYPES)
    if len(scale.shape) != 2 or scale.shape[1] != rows:
        found.require_shape(scale, (scale.shape[0] if scale.shape else 1, rows))
    size = found.groups(columns, scale, 0)
    found.require_dtype(zeros, {"I32"}, "zero point")
    found.require_shape(zeros, (scale.shape[0], math.ceil(rows * bits / 32)))
    return Recipe(
        scheme, f"{stem}.weight", (rows, columns), scale, (1, *scale.shape), (1, size), bits=bits, zeros=zeros, order=order,
        zero_offset=found.format.zero_offset,
    )  # fmt: skip


def _stack(lead: list[int]) -> tuple[int]:
    return (lead[0] if lead else 1,)


# --- configs


def read_format(checkpoint: Checkpoint) -> Format:
    """The format that a checkpoint's config declares, or ModelOpt's `hf_quant_config.json` beside it.

    A format that only cannot be computed with is no error: its `obstacle` says so.

    Raises:
        CheckpointError: an entry that cannot be understood.
        UnsupportedError: a `quantization_config` without a `quant_method`.
    """
    table = quantization_table(checkpoint.config)
    if table is None or (table["quant_method"].lower().startswith("modelopt") and _algorithm(table) is None):
        table = _read_modelopt(checkpoint) or table
    if table is None:
        return Format("unquantised")
    method = table["quant_method"].lower()
    if method.startswith("modelopt"):
        return _read_modelopt_algorithm(table)
    if method in ("fp8", "mxfp8"):
        return _read_fp8(table, method)
    readers = {"compressed-tensors": _read_compressed, "awq": _read_awq, "gptq": _read_gptq}
    if method in readers:
        return readers[method](table)
    if method == "mxfp4":
        return Format("MXFP4", quantized=True, method=method)
    return _obstructed(
        table["quant_method"], f"the checkpoint's quantisation {table['quant_method']!r} cannot be computed with", table
    )


def quantization_table(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config's `quantization_config`, or that of its part for text; None where neither has one.

    Raises:
        UnsupportedError: one without a `quant_method`.
    """
    return quantization_of(config) or quantization_of(text_section(config))


def _obstructed(name: str, obstacle: str, table: Mapping[str, Any]) -> Format:
    """A format whose values cannot be computed; its bits still count."""
    bits = table.get("bits", table.get("w_bit", table.get("nbits")))
    if bits is None and (table.get("load_in_4bit") or table.get("_load_in_4bit")):
        bits = 4
    return Format(name, obstacle, quantized=True, method=table["quant_method"].lower(), rules=(Rule(bits=_bits(bits)),))


def _bits(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= 8 else None


def _size(table: Mapping[str, Any], *keys: str) -> int | None:
    """A group's size under the first of some keys; None where none of them says it."""
    value = next((table[key] for key in keys if table.get(key) is not None), None)
    if value is None or (type(value) is int and (value > 0 or value == -1)):
        return value
    raise CheckpointError(f"{CONFIG_NAME} gives {keys[0]} as {value!r}, where a number of values is expected")


def _block(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    return None


def _read_fp8(table: Mapping[str, Any], method: str) -> Format:
    """`weight_block_size` [rows, columns]; without it FP8 has a scale per tensor, and MXFP8 blocks of [1, 32]."""
    stated = table.get("weight_block_size")
    block = _block(stated) if stated is not None else (1, 32) if method == "mxfp8" else None
    if stated is not None and block is None:
        return _obstructed("FP8", f"the checkpoint's quantisation {method!r} has the weight_block_size {stated}", table)
    name = "MXFP8" if block == (1, 32) else "FP8 with block scales" if block else "FP8 with a scale per tensor"
    return Format(name, quantized=True, method=method, rules=(Rule(bits=8, block=block),))


def _read_awq(table: Mapping[str, Any]) -> Format:
    """Bits under `bits` or `w_bit`, groups under `group_size` or `q_group_size`; only the layout of version `gemm` is read."""
    bits = _bits(table.get("bits", table.get("w_bit")))
    version = str(table.get("version") or table.get("format") or "gemm").lower()
    if bits != 4 or version != "gemm" or table.get("zero_point") is False:
        what = f"{bits} bits, version {version!r}, zero_point {bool(table.get('zero_point', True))}"
        return _obstructed(
            "AWQ",
            f"the checkpoint's AWQ weights have {what}; only 4 bits, 'gemm' and zero points can be computed with",
            table,
        )
    rule = Rule(bits=bits, integer=True, group_size=_size(table, "group_size", "q_group_size"))
    return Format("INT4 (AWQ)", quantized=True, method="awq", rules=(rule,))


def _read_gptq(table: Mapping[str, Any]) -> Format:
    """Bits under `bits`, groups under `group_size`, others for some modules under `dynamic`.

    `checkpoint_format` `gptq` stores zero points less one, `gptq_v2` as they are.
    """
    bits, stored = _bits(table.get("bits")), str(table.get("checkpoint_format") or table.get("format") or "gptq")
    rules = []
    for pattern, entry in [*_tables(table, "dynamic"), ("", {})]:
        if not pattern.startswith("-:"):
            own = {**table, **entry}
            targets = ("re:" + pattern.removeprefix("+:"),) if pattern else ()
            rules.append(Rule(targets, _bits(own.get("bits")), integer=True, group_size=_size(own, "group_size")))
    unread = next((rule.bits for rule in rules if rule.bits not in _BITS), bits)
    if unread not in _BITS or stored not in ("gptq", "gptq_v2") or table.get("is_marlin_format"):
        what = f"{unread} bits in the layout {'marlin' if table.get('is_marlin_format') else stored!r}"
        obstacle = f"the checkpoint's GPTQ weights have {what}; only 2, 4 or 8 bits in 'gptq' or 'gptq_v2' can be computed with"
        return _obstructed("GPTQ", obstacle, table)
    widths = dict.fromkeys(rule.bits for rule in reversed(rules))
    name = " and ".join(f"INT{width}" for width in widths) + " (GPTQ)"
    offset = 1 if stored == "gptq" else 0
    return Format(name, quantized=True, method="gptq", rules=_compiled(rules), zero_offset=offset)


def _read_compressed(table: Mapping[str, Any]) -> Format:
    """compressed-tensors: a rule for each of the `config_groups` that has weights."""
    kinds: dict[str, None] = {}
    rules: list[Rule] = []
    stored = {str(table.get("format") or "dense")}
    for _, group in _tables(table, "config_groups"):
        weights = group.get("weights")
        if not isinstance(weights, dict):
            continue
        if group.get("format") is not None:
            stored.add(str(group["format"]))
        rule = _compressed_rule(group.get("targets"), weights)
        rules.append(rule)
        kinds[_kind(rule)] = None
    name = f"{' and '.join(kinds)} (compressed-tensors)" if kinds else "compressed-tensors"
    strange = sorted(stored - _COMPRESSED_FORMATS)
    sparsity = table.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        strange.append(str(sparsity["format"]))
    obstacle = None
    if strange:
        obstacle = f"the checkpoint's compressed-tensors format {strange[0]!r} cannot be computed with"
    elif table.get("transform_config"):
        obstacle = (
            "the checkpoint's compressed-tensors config transforms inputs, so its weights alone cannot be computed with"
        )
    elif any(rule.integer and rule.bits not in _BITS for rule in rules):
        width = next(rule.bits for rule in rules if rule.integer and rule.bits not in _BITS)
        obstacle = f"the checkpoint's compressed-tensors weights have {width} bits; only 2, 4 or 8 can be computed with"
    return Format(name, obstacle, quantized=True, method="compressed-tensors", rules=_compiled(rules))


def _compressed_rule(targets: Any, weights: Mapping[str, Any]) -> Rule:
    if targets is not None and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise CheckpointError(
            f"{CONFIG_NAME} has config_groups with targets {targets!r}, where a list of names is expected"
        )
    block = _block(weights.get("block_structure")) if weights.get("strategy") == "block" else None
    if weights.get("strategy") == "block" and block is None:
        raise CheckpointError(f"{CONFIG_NAME} gives block_structure as {weights.get('block_structure')!r}")
    return Rule(
        tuple(targets or ()),
        _bits(weights.get("num_bits")),
        integer=weights.get("type", "int") == "int",
        group_size=_size(weights, "group_size"),
        block=block,
        symmetric=weights.get("symmetric", True) is not False,
    )


def _kind(rule: Rule) -> str:
    """A rule's format for people."""
    if rule.integer:
        return f"INT{rule.bits or ''}"
    return f"{'MX' if rule.group_size == 32 else 'NV' if rule.bits == 4 else ''}FP{rule.bits or ''}"


def _tables(table: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    value = table.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise CheckpointError(f"{CONFIG_NAME} has {key} that is not a table of tables")
    yield from value.items()


def _compiled(rules: list[Rule]) -> tuple[Rule, ...]:
    """The rules, their patterns tried."""
    for target in (target for rule in rules for target in rule.targets if target.startswith("re:")):
        compiled(target[3:], where=CONFIG_NAME)
    return tuple(rules)


def compiled(pattern: str, *, where: str) -> re.Pattern[str]:
    """A quantiser's pattern, refused where trying it on a name could take forever.

    Raises:
        CheckpointError: no regular expression, or one whose repeats stand in each other or are many.
    """
    try:
        tree = re._parser.parse(pattern)  # type: ignore[attr-defined]
        if _repeats(tree) > _MOST_REPEATS:
            raise CheckpointError(f"{where} has the pattern {brief(pattern)}, which could take forever to try")
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where} has the pattern {brief(pattern)}, which is none: {reason_of(error)}") from None


def _repeats(node: Any) -> int:
    """How many open repeats a parsed pattern has; more than are allowed where one stands in another."""
    if isinstance(node, list | re._parser.SubPattern):  # type: ignore[attr-defined]
        return sum(map(_repeats, node))
    if not isinstance(node, tuple):
        return 0
    inner = sum(map(_repeats, node))
    if len(node) == 2 and str(node[0]).endswith("_REPEAT") and int(node[1][1]) >= _OPEN_REPEAT:
        return 1 + (_MOST_REPEATS + 1) * inner
    return inner


def _algorithm(table: Mapping[str, Any]) -> str | None:
    """ModelOpt's `quant_algo`, in `quantization` or at the top; None where only the cache or nothing is quantised."""
    inner = table.get("quantization")
    value = (inner if isinstance(inner, dict) else table).get("quant_algo")
    return value.upper() if isinstance(value, str) else None


def _read_modelopt(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """`hf_quant_config.json`, with the method that its being there says; None without it."""
    if not (checkpoint.path / QUANT_CONFIG_NAME).exists():
        return None
    described = parse_json(read_small(checkpoint.path, QUANT_CONFIG_NAME), origin=QUANT_CONFIG_NAME)
    return {"quant_method": "modelopt", **described}


def _read_modelopt_algorithm(table: Mapping[str, Any]) -> Format:
    algorithm = _algorithm(table)
    if algorithm is None:
        return Format("unquantised")
    kind = _MODELOPT_ALGORITHMS.get(algorithm)
    if kind is None:
        return _obstructed(
            f"{algorithm} (ModelOpt)",
            f"the checkpoint's ModelOpt quantisation {algorithm!r} cannot be computed with",
            table,
        )
    return Format(f"{kind} (ModelOpt)", quantized=True, method="modelopt")
