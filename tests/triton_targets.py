"""What needs triton: AdamW against its bound, and every kernel compiled where there is no GPU."""

from __future__ import annotations

import importlib

import torch

from funczero.kernels.adamw import reference as adamw
from funczero.kernels.adamw import trial as updates

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64", "bits": "*i16"}


def beyond():
    """The updates in which AdamW in Triton is outside its bound."""
    from funczero.kernels.adamw import gpu

    bad = []
    for words, (trees, count, factor, found, rates) in updates.cases(CPU, DTYPES):
        k, case = len(trees[0]), (trees, count, factor, found, rates)
        news, wants = updates.called(gpu, case), updates.called(adamw, case)
        for i in range(k):
            p, g, m, v = (tree[i].double() for tree in trees)
            g = g * factor.double()
            g = g.abs() if rates.decoupled else g.abs() + rates.weight_decay * p.abs()
            size = rates.lr / (1 - rates.beta1 ** float(count))
            root = (wants[2 * k + i].double() / (1 - rates.beta2 ** float(count))).sqrt() + rates.eps
            term = (m.abs() + g, v + g * g)
            terms = (p.abs() + size * term[0] / root, *term)
            for which, (units, top) in enumerate(zip((8, 4, 4), terms, strict=True)):
                new, want, info = news[which * k + i], wants[which * k + i], torch.finfo(trees[0][i].dtype)
                near = (new.double() - want.double()).abs() <= units * info.eps * top + info.tiny
                if not bool((near | (new == want) | ~(top < info.max / 64)).all()):
                    bad.append(f"{words}, leaf {i}, {'pmv'[which]}")
    return bad


def compiled():
    """What every kernel in Triton becomes for two kinds of GPU, by its name and dtype."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places, numbers, codes, width = "starts sizes leaf low high found", "n count width", "codes joined read_codes", 1024
    fixed = dict(DRAWN=True, ADDED=True, SPLITS=True, HALF=False, HALFS=False, WIDTH=width, STEPS=5, TIMES=0.5)
    fixed |= dict(MANY=width, DECOUPLED=True)
    made = {}
    for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        for dtype, pointer in POINTERS.items():
            wide, bits = dtype == "float64", dtype == "bits"
            for form, (kept, limit) in {"int8": (0, 127.0), "int4": (0, 7.0), "e4m3": (3, 448.0)}.items():
                for fn in kernels_of(form):
                    if bits and "BFLOAT" not in fn.arg_names:
                        continue
                    types = {name: "*i64" for name in places.split()} | {name: "i64" for name in numbers.split()}
                    types |= {name: "*u8" for name in codes.split()} | {"numbers": "*fp64"}
                    types |= {name: "*fp64" for name in ("scales", "units", "halves")}
                    types |= {name: "*fp64" if wide else "*fp32" for name in ("tops", "draws", "read_tops")}
                    values = dict(fixed, WIDE=wide, NIBBLES=form == "int4", KEPT=kept, LIMIT=limit, BFLOAT=bits)
                    constants = {(i,): values[x] for i, x in enumerate(fn.arg_names) if x in values}
                    signature = {x: "constexpr" if x in values else types.get(x, pointer) for x in fn.arg_names}
                    source = ASTSource(fn=fn, signature=signature, constexprs=constants)
                    out = triton.compile(source, target=target, options=dict(enable_fp_fusion=False))
                    made[f"{fn.__name__}, {form}, {dtype}, {target.backend}"] = len(out.asm[list(out.asm)[-1]])
    return made


def kernels_of(form):
    """The kernels in Triton that a form of codes changes; with int8 the others, too."""
    block, turn, add, move = (
        importlib.import_module(f"funczero.kernels.{name}.gpu")
        for name in ("block_quantise", "hadamard", "grid", "adamw")
    )
    more = [block._join, turn._turn, add._add, add._back, move._update] if form == "int8" else []
    return [block._quantise, block._dequantise, *more]
