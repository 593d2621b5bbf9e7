"""Which variant of the kernels serves, what is refused, and that tiles are the emulated tiles bit for bit."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import native, random_ids, tiny_model

from lorabatch import kernels, processor
from lorabatch.errors import LorabatchError
from lorabatch.infer.program import Program
from lorabatch.model.fused import passes_for
from lorabatch.model.linear import packed_product
from lorabatch.model.panels import PANEL, Panels, panels, whole

HERE = [v.name for v in kernels.VARIANTS if kernels._lacks(v, named=True) is None]
needs_kernels = pytest.mark.skipif(kernels.library("step") is None, reason="no CPU kernels on this machine (compiler or AVX-512 missing)")
ZEN4 = "fpu avx512f avx512bw avx512vl avx512dq avx512cd avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} amx_tile amx_bf16 amx_int8"
CASCADE_LAKE = ZEN4.replace(" avx512_bf16", "")


def python(code, **environment):
    environment = {"PYTHONPATH": "src", "PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


def lorabatch(*arguments, **environment):
    return python(f"from lorabatch.cli import main; raise SystemExit(main({list(arguments)!r}))", **environment)


@pytest.mark.parametrize(
    ("flags", "vendor", "refused", "best"),
    [
        (SAPPHIRE_RAPIDS, "GenuineIntel", None, "amx"),
        (SAPPHIRE_RAPIDS, "GenuineIntel", "the operating system does not permit tiles: Operation not permitted", "vnni"),
        (ZEN4, "AuthenticAMD", None, "zen4"),
        (ZEN4, "GenuineIntel", None, "vnni"),  # Cooper Lake, or a virtual machine that hides tiles: vdpbf16ps is slow there
        (CASCADE_LAKE, "GenuineIntel", None, "vnni"),
        (CASCADE_LAKE.replace(" avx512_vnni", ""), "GenuineIntel", None, "avx512"),
        ("fpu avx2 fma", "AuthenticAMD", None, None),
        ("", "", None, None),  # no /proc/cpuinfo
    ],
)
def test_the_best_variant_that_the_processor_has_serves(monkeypatch, flags, vendor, refused, best):
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    monkeypatch.setattr(processor, "cpuinfo", {"flags": flags, "vendor_id": vendor}.get)
    monkeypatch.setattr(kernels, "_tiles_refused", lambda: refused)
    names = [v.name for v in kernels._candidates()]
    assert names[:1] == ([best] if best else []) and "emulated-amx" not in names


def test_a_variant_that_this_processor_lacks_is_refused_with_those_that_it_has(tmp_path):
    (missing,) = [n for n in ("amx",) if n not in HERE] or [None]
    if missing is None:
        pytest.skip("this processor has all variants")
    done = lorabatch("train", "--base_model", "nowhere", "--save_dir", str(tmp_path), LORABATCH_KERNELS=missing)
    assert done.returncode == 69 and len(done.stderr.splitlines()) == 1
    assert f"LORABATCH_KERNELS={missing}" in done.stderr and ", ".join([*HERE, "off"]) in done.stderr
    unknown = lorabatch("doctor", LORABATCH_KERNELS="avx5120")
    assert unknown.returncode == 64 and "did you mean 'avx512'?" in unknown.stderr


def test_tiles_are_asked_for_and_a_refusal_is_a_reason():
    """A seccomp filter that refuses arch_prctl, as container runtimes set them, in a process of its own."""
    code = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
ld, jeq, ret = 0x20, 0x15, 0x06  # of classic BPF: load the number of the system call, compare, return
program = [(ld, 0, 0, 0), (jeq, 0, 1, 158), (ret, 0, 0, 0x00050000 | 1), (ret, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *x) for x in program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0
from lorabatch import kernels
print(kernels._tiles_refused())
"""
    done = python(code)
    assert done.stdout.strip() == "the operating system does not permit tiles: Operation not permitted", done.stderr


@needs_kernels
def test_a_library_that_others_could_have_put_there_is_never_loaded(tmp_path):
    code = "import torch; from lorabatch import kernels; print(kernels.library('step') is not None, kernels._cache_folder())"
    cache = tmp_path / "cache"
    first = python(code, XDG_CACHE_HOME=str(cache))
    (built,) = (cache / "lorabatch" / "kernels").glob("step-*.so")
    assert first.stdout.split() == ["True", str(built.parent)]
    size = built.stat().st_size
    for damage in (lambda: built.write_bytes(b"not a library"), lambda: built.chmod(0o777)):
        damage()
        again = python(code, XDG_CACHE_HOME=str(cache))
        assert again.stdout.split() == ["True", str(built.parent)] and built.stat().st_size == size and not built.stat().st_mode & 0o022
    if os.geteuid() == 0:
        os.chown(cache / "lorabatch" / "kernels", 12345, 12345)
        other = python(code, XDG_CACHE_HOME=str(cache))
        assert other.stdout.split()[0] == "True" and str(cache) not in other.stdout and "not this user's alone to write" in other.stderr


@needs_kernels
@pytest.mark.parametrize("field", ["token id", "position", "slot", "tokens", "groups"])
def test_a_step_that_does_not_fit_what_was_recorded_is_refused(field):
    model = native(tiny_model("llama"))
    spec = model.spec
    cache = torch.zeros(spec.num_layers, 2, 2, spec.num_kv_heads, 64, spec.head_dim, dtype=model.decoder.dtype)
    program = Program(model.decoder, cache=cache, max_tokens=4)
    ids, good = random_ids([3])[0].tolist(), {"positions": [0, 1, 2], "slots": [0, 0, 0], "group_starts": [0, 3]}
    program.run(ids, **good)
    bad = {
        "token id": ([spec.vocab_size, *ids[1:]], {}),
        "position": (ids, {"positions": [0, 1, 64]}),
        "slot": (ids, {"slots": [0, 0, 2]}),
        "tokens": (ids * 2, {"positions": list(range(6)), "slots": [0] * 6, "group_starts": [0, 6]}),
        "groups": (ids, {"group_starts": [0, 4]}),
    }[field]
    with pytest.raises(LorabatchError, match=f"does not fit what was recorded: {field}") as caught:
        program.run(bad[0], **{**good, **bad[1]})
    assert caught.value.exit_code == 70


@needs_kernels
def test_training_kernels_refuse_targets_beyond_the_vocabulary():
    passes = passes_for(torch.zeros(1))
    with pytest.raises(LorabatchError, match="do not fit together"):
        passes.loss_rows(torch.zeros(2, 32), torch.tensor([3, 32]), replace=False, smoothing=0.0, z=0.0)


# Products of one library of a variant, by its plain C functions.


def library(name, variant):
    return kernels._loaded(name, next(v for v in kernels.VARIANTS if v.name == variant))


def product(variant, x, weight, bias=None):
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    packed = panels(weight)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (x, packed, bias, y)]
    getattr(library("train", variant), f"lb_product_{str(x.dtype).removeprefix('torch.')}")(
        *pointers, *(ctypes.c_int64(n) for n in (*y.shape, x.shape[1], 2))
    )
    return y


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_kernels
@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("sizes", [(576, 96), (96, 576), (70, 50), (2, 48), (1536, 48)], ids=str)  # (K, N): with and without whole tiles
def test_a_product_is_right_and_each_row_is_its_own_in_every_variant(variant, sizes):
    k, n = sizes
    x, weight, bias = random(70, k, seed=1), random(n, k, seed=2), random(n, seed=3)
    whole = product(variant, x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    assert (whole.double() - exact).norm() <= 3e-3 * exact.norm()
    for count in (1, 2, 15, 16, 17, 33, 64):
        for rows in (slice(0, count), slice(70 - count, 70)):
            assert torch.equal(product(variant, x[rows].contiguous(), weight, bias), whole[rows])


@needs_kernels
@pytest.mark.parametrize("tiles", [v for v in HERE if v.endswith("amx")])
@pytest.mark.parametrize("k", [2, 30, 32, 64, 70, 576])
def test_a_tile_product_is_the_manuals_pseudo_code(tiles, k):
    """Per 16 words of K: even and odd products in two fused chains from zero, added, then added to the sum; every step rounds."""
    x, weight = random(5, k, seed=1), random(48, k, seed=2)
    fma = ctypes.CDLL("libm.so.6").fmaf
    fma.argtypes, fma.restype = [ctypes.c_float] * 3, ctypes.c_float
    single = torch.tensor
    got = product(tiles, x, weight)
    for row in range(5):
        for column in (0, 17, 47):
            total = single(0.0)
            for start in range(0, k, 32):
                chains = [0.0, 0.0]
                for i in range(start, min(start + 32, k)):
                    chains[i % 2] = fma(float(x[row, i]), float(weight[column, i]), chains[i % 2])
                total = total + (single(chains[0]) + single(chains[1]))
            assert got[row, column] == total.to(torch.bfloat16)


@needs_kernels
@pytest.mark.skipif("amx" not in HERE, reason="this processor has no tiles, or they are not permitted")
@pytest.mark.parametrize("k", [2, 70, 576])
def test_the_processors_tiles_equal_the_emulated_ones(k):
    for rows in range(1, 34):
        x, weight = random(rows, k, seed=rows), random(100, k, seed=2)
        assert torch.equal(product("amx", x, weight), product("emulated-amx", x, weight))


@needs_kernels
@pytest.mark.skipif(not {"zen4", "vnni"} <= set(HERE), reason="this processor has no bf16 instructions to compare with")
def test_shift_and_fma_give_the_bits_of_the_bf16_instruction():
    x, weight = random(33, 576, seed=1), random(100, 576, seed=2)
    assert torch.equal(product("zen4", x, weight), product("vnni", x, weight))


@needs_kernels
@pytest.mark.parametrize("variant", HERE)
def test_eight_bit_products_do_not_saturate(variant):
    """255 x 127 in both bytes of a pair: the trap of vpmaddubsw. Through the recorded program's product, against whole numbers."""
    code = """
import torch
from helpers import native, tiny_model
from lorabatch.infer.packed import pack
from lorabatch.infer.program import GREEDY, LOGITS, PRODUCT, _Op, _Step
from lorabatch.kernels import library, variant
import ctypes
k, n = 64, 48
packed = pack(torch.full((n, k), 127.0), quantize="int8")  # every weight 127
rows = torch.full((1, k), 255, dtype=torch.uint8)
scale = torch.zeros(1, 16); scale[0, 0] = 1.0  # RowScale: one, no outliers
out = torch.zeros(1, n)
op = _Op(kind=PRODUCT, mode=LOGITS, weight=1, n=n, k=k, a=rows.data_ptr(), b=packed.panels.data_ptr(), c=packed.scales.data_ptr(),
         d=packed.sums.data_ptr(), out=out.data_ptr(), scales=scale.data_ptr())
step = _Step(bf16=0, outputs=1, max_tokens=1, threads=1)
scratch = torch.zeros(4096); step.scratch = scratch.data_ptr(); step.scratch_floats = 4096
assert library("step").lb_run(ctypes.byref(op), ctypes.c_int64(1), ctypes.byref(step)) == 0
print(variant(), set(out[0].tolist()))
"""
    done = python(code, LORABATCH_KERNELS=variant, PYTHONPATH=os.pathsep.join(["src", "tests"]))
    assert done.stdout.split(maxsplit=1) == [variant, f"{{{float(64 * 127 * 127)}}}\n"], done.stderr


@needs_kernels
def test_panels_agree_with_the_plain_product_and_its_gradient(monkeypatch):
    weight, x, grad, bias = random(100, 64), random(9, 64, seed=1), random(9, 100, seed=2), random(100, seed=3)
    ours = Panels(weight)
    for got, expected in ((ours.forward(x, bias), x @ weight.t() + bias), (ours.input_grad(grad), grad @ weight)):
        assert (got - expected).float().norm() < 8e-3 * expected.float().norm()
    monkeypatch.setattr("lorabatch.model.panels.has_tiles", lambda: True)
    assert isinstance(packed_product(weight), Panels) and not isinstance(packed_product(weight.float()), Panels)
    assert whole(100, PANEL) == 144


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in HERE if v not in ("zen4", "amx")])
def test_the_kernels_tests_pass_in_every_variant_that_runs_here(variant):
    files = [f"tests/test_{name}.py" for name in ("program", "fused", "infer_adapters", "linear")]
    environment = {**os.environ, "LORABATCH_KERNELS": variant}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files],
        env=environment, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
