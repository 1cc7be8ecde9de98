"""Compile the row kernel for sm_80 and sm_90, without a GPU. Prints a JSON list of
(row, architecture, form, registers, stack, wide, barrier) per variant.

stack: bytes, where spilled registers would be. wide: logits are loaded 16 bytes at a time, and those that are
fetched ahead copied so. barrier: one comes right before the stores of the gradient, which overwrite other
threads' logits.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import rows_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(name, arch, form="full", without=(), dz="bf16", mix=False, softcap=False, clip=False):
    """The kernel as `fill` would launch it. `without`: pointer arguments that are None."""
    names = rows_triton.row_kernel.arg_names
    forward, reverse = rows_triton.KL_FAMILY.get(name, (False, False))
    constants = dict(FORMULA=rows_triton.FORMULAS[name], FORWARD=forward, REVERSE=reverse, MIX=mix,
                     UNION=True, FORM=form, BLOCK=rows_triton.BLOCK, STAGES=rows_triton.STAGES)
    constants |= dict.fromkeys([*without, *(["least_z_ptr", "least_t_ptr"] if form == "full" else []),
                                *([] if softcap else ["softcap_s", "softcap_t"]),
                                *([] if clip else ["clip"])])
    types = {"label_ptr": "*i64", "dz_ptr": f"*{dz}", "stride": "i32", "dz_stride": "i32", "V": "i32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32" if n.endswith("_ptr") else "fp32")
                 for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in ("stride", "dz_stride")]
    at = lambda n: (names.index(n),)
    source = ASTSource(rows_triton.row_kernel, signature, {at(n): x for n, x in constants.items()},
                       {at(n): [["tt.divisibility", 16]] for n in aligned})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32),
                          options={"num_warps": rows_triton.WARPS})


def resources(kernel):
    """(registers per thread, bytes of stack)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups()))


variants = [(name, arch, {}) for name in rows_triton.FORMULAS for arch in (80, 90)]
variants += [(name, 90, dict(form=form, mix=True, softcap=True, clip=True))
             for name in ("rkl", "jsd") for form in ("full", "raw", "sg", "renorm", "tail")]
variants += [("fkl", 90, dict(without=["w_ptr", "weight_ptr"], dz="fp32")),
             ("rkl", 90, dict(without=["dz_ptr"]))]
rows = []
for name, arch, options in variants:
    kernel = compiled(name, arch, **options)
    ptx = kernel.asm["ptx"]
    before_stores = re.split(r"ld\.global|\$L__BB\d+_\d+:", ptx.rpartition("st.global.v4")[0])[-1]
    stores = "dz_ptr" not in options.get("without", ())
    wide = "cp.async.cg" in ptx and "cp.async.ca" not in ptx and ("ld.global.v4.b32" in ptx or not stores)
    rows.append((name, arch, options.get("form", "full"), *resources(kernel), wide,
                 "bar.sync" in before_stores or not stores))
print(json.dumps(rows))
