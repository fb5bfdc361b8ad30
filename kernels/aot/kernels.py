"""The one list of Triton kernels that are compiled ahead of time: which kernel, dtypes, constants, warps.

`shipped()` is what the tests hold to its limits on registers and shared memory, and what a build of the library
compiles. An operation adds a function that returns its `ShippedKernel`s, and that function to `shipped()`.

Arguments are written as Triton types, with ":16" where a launch may rely on a multiple of 16 (without it, loads are
single elements wide); whatever is no string is a constant of the kernel, None a pointer that is not given. A pointer to
one number per row has no ":16": nothing is gained by it, and the rows of a last chunk may begin anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from aot.compile import Compiled, compile_kernel
from coars_kernels.agent_lora import triton_lora
from coars_kernels.branch_attention import triton_branch
from coars_kernels.credit_policy_loss import triton_credit
from coars_kernels.credit_policy_loss.reference import OBJECTIVES
from coars_kernels.linear_logprob import triton_fused, triton_rows
from coars_kernels.paged_decode_attention import triton_paged
from coars_kernels.paged_prefill_attention import triton_prefill
from coars_kernels.sample_with_logprob import triton_sample


@dataclass(frozen=True)
class ShippedKernel:
    """One kernel with its dtypes and constants fixed."""

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    capabilities: tuple[int, ...] = (80, 90)
    tensor_cores: bool = False
    """Whether it multiplies matrices of 16-bit numbers, which on sm_90 must be by wgmma."""

    def ordered_arguments(self) -> list[tuple[str, Any]]:
        """(name, type or constant) in the order of the kernel's parameters."""
        return [(name, self.arguments[name]) for name in self.kernel.arg_names]

    def compile(self, capability: int) -> Compiled:
        """Compile it, or take it from Triton's cache."""
        types = {name: value.split(":") for name, value in self.arguments.items() if isinstance(value, str)}
        return compile_kernel(
            self.kernel,
            {name: parts[0] for name, parts in types.items()},
            {name: value for name, value in self.arguments.items() if name not in types},
            capability=capability,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            divisible=[name for name, parts in types.items() if parts[1:] == ["16"]],
        )


def head_rows() -> list[ShippedKernel]:
    """Row kernels of the head, each plain and with everything asked for: bias, entropy, a temperature per row."""
    kernels = []
    for full in (False, True):
        options = {
            "bias": "*fp32:16" if full else None,
            "entropy": "*fp32" if full else None,
            "temperature": "*fp32" if full else "fp32",
            "ROW_TEMPERATURE": full,
        }
        suffix = "_full" if full else ""
        for dtype in ("bf16", "fp16", "fp32", None):
            arguments = {
                "logits": "*fp32:16",
                "target": "*i64",
                "mass": f"*{dtype}:16" if dtype else None,
                "logp": "*fp32",
                "others_share": "*fp32",
                "inverse": "*fp32",
                "vocab_size": "i32",
                "logits_stride": "i32:16",
                "mass_stride": "i32:16",
                "LARGEST_FIRST": dtype in ("fp16", "fp32"),
                "BLOCK": triton_rows.BLOCK,
            }
            name = f"head_rows_{dtype or 'logp'}{suffix}"
            kernel = triton_rows.row_masses_kernel
            kernels.append(ShippedKernel(name, kernel, arguments | options, triton_rows.NUM_WARPS))
    for dtype in ("bf16", "fp16", "fp32"):
        for full in (False, True):
            arguments = {
                "product": "*fp32:16",
                "weight": f"*{dtype}:16",
                "target": "*i64",
                "others_share": "*fp32",
                "inverse": "*fp32",
                "temperature": "*fp32" if full else "fp32",
                "out": "*fp32:16",
                "hidden_size": "i32:16",
                "product_stride": "i32:16",
                "weight_stride": "i32:16",
                "out_stride": "i32:16",
                "ROW_TEMPERATURE": full,
                "BLOCK": triton_rows.JACOBIAN_BLOCK,
            }
            name, kernel = f"head_jacobian_{dtype}{'_full' if full else ''}", triton_rows.jacobian_kernel
            kernels.append(ShippedKernel(name, kernel, arguments, triton_rows.JACOBIAN_WARPS))
    return kernels


def head_fused() -> list[ShippedKernel]:
    """The fused head: paired or alone, with masses or log-probabilities only, and with everything asked for."""
    variants = {
        "pair": {"teacher": True, "mass": True, "full": False},
        "pair_full": {"teacher": True, "mass": True, "full": True},
        "alone": {"teacher": False, "mass": True, "full": False},
        "logp": {"teacher": False, "mass": False, "full": False},
    }
    kernels = []
    for dtype in ("bf16", "fp16", "fp32"):
        for name, variant in variants.items():
            if dtype != "fp16" or name == "pair":  # the only call in fp16 that a step makes
                kernels += _head_fused(f"head_fused_{dtype}_{name}", dtype, **variant)
    # the teacher's rows; the student's without a gradient, with one, and with the entropy too
    finishes = {"": (), "_logp": ("others_share", "inverse"), "_masses": ("rounded", "others_share", "inverse")}
    finishes["_full"] = (*finishes["_masses"], "weighted", "entropy")
    for suffix, given in finishes.items():
        arguments = {
            "others": "*fp32",
            "logp": "*fp32",
            **dict.fromkeys(("rounded", "weighted", "others_share", "inverse", "entropy")),
            **dict.fromkeys(given, "*fp32"),
            "num_rows": "i32",
            "vocab_tiles": "i32",
            "others_stride": "i32",
            "BLOCK_ROWS": triton_fused.FINISH_ROWS,
            "BLOCK_TILES": triton_fused.FINISH_TILES,
        }
        name, kernel = f"head_finish{suffix}", triton_fused.finish_kernel
        kernels.append(ShippedKernel(name, kernel, arguments, triton_fused.FINISH_WARPS))
    return kernels


def _head_fused(name: str, dtype: str, *, teacher: bool, mass: bool, full: bool) -> list[ShippedKernel]:
    """The product, with its tiles per capability, and the anchor and repair kernels around it."""
    operands = {
        "student": f"*{dtype}:16",
        "teacher": f"*{dtype}:16" if teacher else None,
        "weight": f"*{dtype}:16",
        "bias": "*fp32:16" if full else None,
        "target": "*i64:16",
        "anchor": "*fp32:16",
        "num_rows": "i32",
        "hidden_size": "i32:16",
        "student_stride": "i32:16",
        "teacher_stride": "i32:16",
        "weight_stride": "i32:16",
    }
    sweep = operands | {
        "temperature": "*fp32:16" if full else "fp32",
        "ROW_TEMPERATURE": full,
        "mass": f"*{dtype}:16" if mass else None,
        "vocab_size": "i32",
        "mass_stride": "i32:16",
        "mass_columns": "i32:16",
    }
    partial_sums = {
        "others": "*fp32:16",
        "rounded": "*fp32:16" if mass else None,
        "weighted": "*fp32:16" if full else None,
    }
    repair = {
        "logp": "*fp32",
        "others_share": "*fp32",
        "inverse": "*fp32",
        "entropy": "*fp32" if full else None,
        "BLOCK_VOCAB": triton_fused.REPAIR_VOCAB,
        "BLOCK_HIDDEN": triton_fused.REPAIR_HIDDEN,
    }
    anchor = operands | {"BLOCK": triton_fused.ANCHOR_BLOCK}
    kernels = [ShippedKernel(f"{name}_repair", triton_fused.repair_kernel, sweep | repair, triton_fused.REPAIR_WARPS)]
    if mass:  # without masses it is the same
        kernels.append(ShippedKernel(f"{name}_anchor", triton_fused.anchor_kernel, anchor, triton_fused.ANCHOR_WARPS))
    for (capability, size), config in triton_fused.CONFIGS.items():
        if size != (4 if dtype == "fp32" else 2):
            continue
        tiles = {
            "WHOLE_STEPS": True,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_VOCAB": config.block_vocab,
            "BLOCK_HIDDEN": config.block_hidden,
            "GROUP_ROWS": config.group_rows,
        }
        kernels.append(
            ShippedKernel(
                name,
                triton_fused.fused_masses_kernel,
                sweep | partial_sums | tiles,
                config.num_warps,
                config.num_stages,
                capabilities=(capability,),
                tensor_cores=size == 2,
            )
        )
    return kernels


def credit_policy_loss() -> list[ShippedKernel]:
    """The policy loss in every way in which the trainer may ask for it, the least that can be, and what runs around it.

    What is given stands in the name: a teacher, its mean credit, an old policy beside the sampler's, a weighted
    divergence, a dual clip; all of it in the plain name. Weights and agents of turns are given, offsets are int32.
    """
    floats, sums = "*fp32:16", "*fp64:16"
    turns = {"offsets_ptr": "*i32:16", "weight_ptr": floats, "agent_ptr": "*i8:16"}
    tokens = ("grad", "logp", "teacher", "anchor", "sampler", "reference", "reward")
    numbers = (
        "default_weight",
        "credit_weight",
        "credit_clip",
        "low",
        "high",
        "dual_clip",
        "importance_cap",
        "kl_weight",
    )
    everything = {"sums_ptr": sums, "center_ptr": sums, **{f"{name}_ptr": floats for name in tokens}, **turns}
    everything |= {**dict.fromkeys(numbers, "fp32"), "BLOCK": triton_credit.BLOCK_TOKENS}
    optional = {
        "teacher": ("teacher_ptr",),
        "center": ("center_ptr",),
        "old": ("sampler_ptr",),
        "kl": ("reference_ptr", "kl_weight"),
        "dual": ("dual_clip",),
    }
    policy, warps = triton_credit.credit_policy_kernel, triton_credit.NUM_WARPS
    kernels = []
    for number, objective in enumerate(OBJECTIVES):
        possible = [name for name in optional if name != "dual" or objective in ("clipped", "gspo")]
        for given in product(*((False, True) for _ in possible)):
            names = [name for name, one in zip(possible, given, strict=True) if one]
            if "teacher" not in names and ("center" in names or "old" in names):
                continue  # no credit to centre; and one of the others would keep 8 bytes on the stack
            absent = [argument for name in optional if name not in names for argument in optional[name]]
            suffix = "" if names == possible else "_" + ("_".join(names) or "alone")
            arguments = everything | dict.fromkeys(absent) | {"OBJECTIVE": number}
            kernels.append(ShippedKernel(f"credit_{objective}{suffix}", policy, arguments, warps))
    missing = [argument for arguments in optional.values() for argument in arguments]
    least = everything | dict.fromkeys((*missing, "anchor_ptr", "weight_ptr", "agent_ptr")) | {"OBJECTIVE": 0}
    center_names = ("sums_ptr", "logp_ptr", "teacher_ptr", *turns, "default_weight", "credit_clip", "BLOCK")
    center = {name: everything[name] for name in center_names}
    metrics = {"loss_ptr": floats, "metrics_ptr": floats, "sums_ptr": sums, "BY_AGENT": True}
    return [
        *kernels,
        ShippedKernel("credit_least", policy, least, warps),
        ShippedKernel("credit_center", triton_credit.credit_center_kernel, center, warps),
        ShippedKernel("credit_metrics", triton_credit.credit_metrics_kernel, metrics, 1),
    ]


def paged_attention() -> list[ShippedKernel]:
    """Decode and prefill over pages of a multiple of 64 tokens, by dtype, head size, and query heads of a kv head (up
    to a power of two; the decode kernels take up to 16 of them)."""
    kernels = []
    for dtype, head_size, groups in (
        ("bf16", 128, (2, 4, 8)),  # Qwen3 below 8B; Qwen3-8B and Llama 3; Qwen2.5-7B
        ("bf16", 64, (8,)),
        ("bf16", 256, (2,)),
        ("fp16", 128, (8,)),
        ("fp32", 128, (8,)),
    ):
        for capability in (80, 90):
            kernels += _paged(dtype, head_size, groups, capability)
    return kernels


def _paged(dtype: str, head_size: int, groups: tuple[int, ...], capability: int) -> list[ShippedKernel]:
    name, size = f"{dtype}_{head_size}", 4 if dtype == "fp32" else 2
    numbers, indices, sums = f"*{dtype}:16", "*i32:16", "*fp32:16"
    pages = {
        **dict.fromkeys(("q", "k_pages", "v_pages"), numbers),
        **dict.fromkeys(("page_table", "lengths"), indices),
        **dict.fromkeys(("q_row_stride", "q_head_stride", "page_stride", "slot_stride", "kv_head_stride"), "i32:16"),
        **dict.fromkeys(("table_stride", "page_size", "kv_heads", "head_group"), "i32"),
        "scale_log2": "fp32",
        "ONE_PAGE": True,
    }
    merged = {"out": sums, "lse": sums, "all_splits": "i32"}
    alone = {"out": numbers, "lse": None, "all_splits": "i32", "row_prefix": None, "first_split": "i32"}
    prefix = {**merged, **dict.fromkeys(("row_prefix", "row_offsets", "prefix_length"), indices), "num_groups": "i32"}
    prefill = {"out": numbers, "cu_q": indices, "num_sequences": "i32"}

    def kernel(suffix: str, function: Any, tiles: Any, own: Mapping[str, Any], tensor_cores: bool) -> ShippedKernel:
        tile = tiles[capability, size, 128 if head_size <= 128 else 256]
        fixed = {
            "HEAD_SIZE": head_size,
            "BLOCK_ROWS": tile.block_rows,
            "BLOCK_KEYS": tile.block_keys,
            "BLOCK_HEAD": triton_paged.block_head(head_size),
        }
        arguments = {**pages, **fixed, **own}
        options = (tile.num_warps, tile.num_stages, (capability,), tensor_cores and size == 2)
        return ShippedKernel(f"paged_{suffix}_{name}", function, arguments, *options)

    decode_tiles, decode = triton_paged.DECODE_TILES, triton_paged.decode_kernel
    kernels = [
        # 16 rows are too few for wgmma: they take the smaller instruction everywhere
        kernel("decode", decode, decode_tiles, alone, False),
        kernel("decode_split", decode, decode_tiles, alone | merged, False),
        kernel("decode_rest", decode, decode_tiles, alone | merged | {"row_prefix": indices}, False),
    ]
    for group in groups:
        own = {"BLOCK_GROUP": group}
        tiles = triton_paged.PREFIX_TILES, triton_prefill.PREFILL_TILES
        kernels.append(kernel(f"prefix{group}", triton_paged.prefix_kernel, tiles[0], prefix | own, True))
        kernels.append(kernel(f"prefill{group}", triton_prefill.prefill_kernel, tiles[1], prefill | own, True))
    merge = {
        "out": numbers,
        "partial": sums,
        "lse": sums,
        "all_splits": "i32",
        "HEAD_SIZE": head_size,
        "BLOCK_HEAD": triton_paged.block_head(head_size),
        "BLOCK_SPLITS": triton_paged.MERGE_SPLITS,
    }
    function, warps = triton_paged.merge_kernel, triton_paged.MERGE_WARPS
    return [*kernels, ShippedKernel(f"paged_merge_{name}", function, merge, warps, capabilities=(capability,))]


def branch_attention() -> list[ShippedKernel]:
    """Branches of a packed trunk, by dtype, head size, and query heads of a kv head (up to a power of two)."""
    strides = ("q_row_stride", "q_head_stride", "row_stride", "head_stride", "trunk_row_stride", "trunk_head_stride")
    kernels = []
    for dtype, head_size, group in (
        *(("bf16", 128, group) for group in (2, 4, 8)),
        ("bf16", 64, 8),
        ("bf16", 256, 2),
        ("fp16", 128, 8),
        ("fp32", 128, 8),
    ):
        size = 4 if dtype == "fp32" else 2
        for capability in (80, 90):
            tile = triton_branch.BRANCH_TILES[capability, size, 128 if head_size <= 128 else 256]
            arguments = {
                **dict.fromkeys(("out", "q", "k", "v", "trunk_k", "trunk_v"), f"*{dtype}:16"),
                **dict.fromkeys(("cu_branch", "trunk_start", "trunk_len"), "*i32:16"),
                **dict.fromkeys(strides, "i32:16"),
                **dict.fromkeys(("num_branches", "kv_heads", "head_group"), "i32"),
                "scale_log2": "fp32",
                "HEAD_SIZE": head_size,
                "BLOCK_ROWS": tile.block_rows,
                "BLOCK_KEYS": tile.block_keys,
                "BLOCK_HEAD": triton_paged.block_head(head_size),
                "BLOCK_GROUP": group,
            }
            name, kernel = f"branch{group}_{dtype}_{head_size}", triton_branch.branch_kernel
            options = (tile.num_warps, tile.num_stages, (capability,), size == 2)
            kernels.append(ShippedKernel(name, kernel, arguments, *options))
    return kernels


def sampling() -> list[ShippedKernel]:
    """Sampling from logits as the engine makes them (fp32), with a seed that a graph follows or not, and in bf16; and
    the most likely token."""
    kernels = []
    for dtype, name in (("fp32", "graph"), ("fp32", "slabs"), ("fp32", "greedy"), ("bf16", "slabs")):
        arguments = {
            "sums": "*fp32:16",
            "places": "*i32:16",
            "logits": f"*{dtype}:16",
            **dict.fromkeys(("sequence_id", "position"), "*i64:16"),
            "seed": "*i64:16" if name == "graph" else None,
            **dict.fromkeys(("num_slabs", "start_0", "start_1"), "i32"),
            **dict.fromkeys(("vocab_size", "logits_stride"), "i32:16"),
            "inverse_temperature": "fp32",
            "GREEDY": name == "greedy",
            "BLOCK": triton_sample.SLAB,
        }
        kernel, warps = triton_sample.slab_kernel, triton_sample.SLAB_WARPS
        kernels.append(ShippedKernel(f"sample_{name}_{dtype}", kernel, arguments, warps))
    merge = {
        "token": "*i64:16",
        "logp": "*fp32:16",
        "sums": "*fp32:16",
        "places": "*i32:16",
        "num_slabs": "i32",
        "BLOCK": triton_sample.MERGE_SLABS,
    }
    return [*kernels, ShippedKernel("sample_merge", triton_sample.merge_kernel, merge, triton_sample.MERGE_WARPS)]


def agent_lora() -> list[ShippedKernel]:
    """Few rows through adapters of the presets' ranks."""
    kernels, options = [], (triton_lora.NUM_WARPS, triton_lora.NUM_STAGES)
    for rank in (16, 32):
        shared = {
            "partial": "*fp32:16",
            "agent_ids": "*i64:16",
            **dict.fromkeys(("num_rows", "num_agents"), "i32"),
            "RANK": rank,
            "BLOCK_RANK": rank,
            "BLOCK_ROWS": triton_lora.BLOCK_ROWS,
        }
        first = {
            **dict.fromkeys(("x", "a"), "*bf16:16"),
            **dict.fromkeys(("in_features", "x_stride", "split_size"), "i32:16"),
            "BLOCK_IN": triton_lora.STEP_BYTES // 2,
        }
        second = {
            **dict.fromkeys(("out", "b"), "*bf16:16"),
            "scale": "fp32",
            "num_splits": "i32",
            "out_features": "i32:16",
            "BLOCK_OUT": triton_lora.OUT_BYTES // 2,
        }
        kernels += [
            ShippedKernel(f"lora_first_bf16_{rank}", triton_lora.first_kernel, shared | first, *options),
            ShippedKernel(f"lora_second_bf16_{rank}", triton_lora.second_kernel, shared | second, *options),
        ]
    return kernels


OPERATIONS = (
    head_rows, head_fused, credit_policy_loss, paged_attention, branch_attention, sampling, agent_lora,
)  # fmt: skip


def shipped() -> list[ShippedKernel]:
    """Every kernel that is compiled ahead of time."""
    return [kernel for operation in OPERATIONS for kernel in operation()]
