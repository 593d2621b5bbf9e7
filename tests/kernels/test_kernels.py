"""Which variant of the kernels serves, what is refused, and that tiles are the emulated tiles bit
for bit."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import native, random_ids, tiny_model
from support.paths import ROOT
from support.processes import python_alone

from lorabatch import kernels, processor
from lorabatch.errors import LorabatchError
from lorabatch.infer.runners.program import Program
from lorabatch.kernels import build, variants
from lorabatch.kernels.api import constants, pointer, type_of
from lorabatch.kernels.onednn import packed_product
from lorabatch.kernels.panels import Panels, panels, whole
from lorabatch.kernels.train_ops import train_ops

CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
HERE = [v.name for v in variants.VARIANTS if variants.lacks(v, named=True) is None]
needs_kernels = pytest.mark.skipif(
    kernels.library("step") is None,
    reason="no CPU kernels on this machine (compiler or AVX2 missing)",
)
# as far as they matter; Alder Lake and its successors have avx_vnni, but no AVX-512
ZEN3 = "fpu fma movbe f16c abm bmi1 avx2 bmi2"
ALDER_LAKE = f"{ZEN3} avx_vnni"
CASCADE_LAKE = f"{ZEN3} avx512f avx512bw avx512vl avx512dq avx512cd avx512_vnni"
ZEN4 = f"{CASCADE_LAKE} avx512_bf16"
GRACE = "fp asimd asimddp bf16 i8mm"
SAPPHIRE_RAPIDS = f"{ZEN4} avx_vnni amx_tile amx_bf16 amx_int8"


def lorabatch(*arguments, **environment):
    return python_alone(
        f"from lorabatch.cli import main; raise SystemExit(main({list(arguments)!r}))",
        **environment,
    )


@pytest.mark.parametrize(
    ("flags", "vendor", "refused", "best"),
    [
        (SAPPHIRE_RAPIDS, "GenuineIntel", None, "amx"),
        (
            SAPPHIRE_RAPIDS,
            "GenuineIntel",
            "the operating system does not permit tiles: Operation not permitted",
            "vnni",
        ),
        (ZEN4, "AuthenticAMD", None, "zen4"),
        # Cooper Lake, or a virtual machine that hides tiles: vdpbf16ps is slow there
        (ZEN4, "GenuineIntel", None, "vnni"),
        (CASCADE_LAKE, "GenuineIntel", None, "vnni"),
        (CASCADE_LAKE.replace(" avx512_vnni", ""), "GenuineIntel", None, "avx512"),
        (ALDER_LAKE, "GenuineIntel", None, "avxvnni"),
        (ZEN3, "AuthenticAMD", None, "avx2"),
        (ZEN3.replace(" f16c", ""), "AuthenticAMD", None, None),
        (GRACE, "", None, "arm-bf16"),
        (GRACE.replace(" bf16 i8mm", ""), "", None, "arm-dot"),  # Neoverse N1
        ("fp asimd", "", None, "arm"),
        ("", "", None, None),  # no /proc/cpuinfo
    ],
)
def test_the_best_variant_that_the_processor_has_serves(monkeypatch, flags, vendor, refused, best):
    monkeypatch.delenv(variants.SWITCH, raising=False)
    monkeypatch.setattr(processor, "cpuinfo", {"flags": flags, "vendor_id": vendor}.get)
    monkeypatch.setattr(variants, "tiles_refused", lambda: refused)
    names = [v.name for v in variants.candidates()]
    assert names[:1] == ([best] if best else []) and "emulated-amx" not in names


def test_the_doctor_says_what_better_variants_lack(monkeypatch):
    """A laptop's processor: every better variant has its reason, in their order."""
    monkeypatch.delenv(variants.SWITCH, raising=False)
    monkeypatch.setattr(processor, "cpuinfo", {"flags": ZEN3, "vendor_id": "AuthenticAMD"}.get)
    monkeypatch.setattr(kernels, "variant", lambda: "avx2")
    reasons = kernels.why_not()
    assert [*reasons] == ["amx", "zen4", "vnni", "avx512", "avxvnni"]
    assert reasons["avxvnni"] == "the processor has no avx_vnni"
    assert reasons["vnni"].startswith("the processor has no avx512_vnni, avx512bw")
    monkeypatch.setattr(processor, "cpuinfo", {"flags": GRACE}.get)
    monkeypatch.setattr(kernels, "variant", lambda: "arm-dot")
    assert [*kernels.why_not()] == ["arm-bf16"]


def test_a_variant_that_this_processor_lacks_is_refused_with_those_that_it_has(tmp_path):
    (missing,) = [n for n in ("amx",) if n not in HERE] or [None]
    if missing is None:
        pytest.skip("this processor has all variants")
    done = lorabatch(
        "train", "--base_model", "nowhere", "--save_dir", str(tmp_path), LORABATCH_KERNELS=missing
    )
    assert done.returncode == 69 and len(done.stderr.splitlines()) == 1
    assert (
        f"LORABATCH_KERNELS={missing}" in done.stderr and ", ".join([*HERE, "off"]) in done.stderr
    )
    unknown = lorabatch("doctor", LORABATCH_KERNELS="avx5120")
    assert unknown.returncode == 64 and "did you mean 'avx512'?" in unknown.stderr


def test_tiles_are_asked_for_and_a_refusal_is_a_reason():
    """A seccomp filter that refuses arch_prctl, as container runtimes set them, in a process of its
    own."""
    code = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
ld, jeq, ret = 0x20, 0x15, 0x06  # of classic BPF: load the number of the system call, compare, return
program = [(ld, 0, 0, 0), (jeq, 0, 1, 158), (ret, 0, 0, 0x00050000 | 1), (ret, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *x) for x in program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0
from lorabatch.kernels import variants
print(variants.tiles_refused())
"""
    done = python_alone(code)
    assert (
        done.stdout.strip() == "the operating system does not permit tiles: Operation not permitted"
    ), done.stderr


def test_nothing_reads_the_interface_before_a_kernel_is_needed():
    code = (
        "import sys, lorabatch.infer.runners, lorabatch.train.run, lorabatch.machine.products; "
        "from lorabatch import kernels; kernels.check(); print('cffi' in sys.modules); "
        "from lorabatch.kernels.api import constants; constants(); print('cffi' in sys.modules)"
    )
    done = python_alone(code)
    assert done.stdout.split() == ["False", "True"], done.stderr


@needs_kernels
@pytest.mark.slow
def test_a_library_that_others_could_have_put_there_is_never_loaded(tmp_path):
    code = (
        "import torch; from lorabatch.kernels import build, library; build.PREBUILT /= 'none'; "
        "print(library('step') is not None, build.cache_folder())"
    )
    cache = tmp_path / "cache"
    # the compiler, asked once: it gives the same library again
    remembering = tmp_path / "c++"
    remembering.write_text(
        f"""#!/bin/bash
for target; do :; done
made={tmp_path}/${{target##*/}}
[[ -f $made ]] || {{ {build.compiler()} "$@" && cp "$target" "$made"; }}
cp "$made" "$target"
"""
    )
    remembering.chmod(0o755)
    here = {"XDG_CACHE_HOME": str(cache), "CXX": str(remembering)}
    first = python_alone(code, **here)
    (built,) = (cache / "lorabatch" / "kernels").glob("step-*.so")
    assert first.stdout.split() == ["True", str(built.parent)]
    size = built.stat().st_size
    foreign = ["-shared", "-x", "c++", os.devnull, "-o", str(built)]
    for damage in (
        lambda: built.write_bytes(b"not a library"),
        lambda: built.chmod(0o777),
        lambda: subprocess.run([build.compiler(), *foreign], check=True),  # without our functions
    ):
        damage()
        again = python_alone(code, **here)
        assert (
            again.stdout.split() == ["True", str(built.parent)]
            and built.stat().st_size == size
            and not built.stat().st_mode & 0o022
        )
    built.parent.chmod(0o777)  # so anybody may have put there what is in it
    built.write_bytes(b"somebody else's library")
    opened = python_alone(code, **here)
    assert (
        opened.stdout.split() == ["True", str(built.parent)]
        and "others could write" in opened.stderr
        and built.stat().st_size == size
        and built.parent.stat().st_mode & 0o777 == 0o755
    )
    if os.geteuid() == 0:
        os.chown(built, 12345, 12345)
        again = python_alone(code, **here)
        assert again.stdout.split()[0] == "True" and built.stat().st_uid == 0
        os.chown(cache / "lorabatch" / "kernels", 12345, 12345)
        other = python_alone(code, **here)
        assert (
            other.stdout.split()[0] == "True"
            and str(cache) not in other.stdout
            and "not this user's alone to write" in other.stderr
        )


@needs_kernels
@pytest.mark.parametrize("field", ["token id", "position", "slot", "tokens", "groups"])
def test_a_step_that_does_not_fit_what_was_recorded_is_refused(field):
    model = native(tiny_model("llama"))
    spec = model.spec
    cache = torch.zeros(
        spec.num_layers, 2, 2, spec.num_kv_heads, 64, spec.head_dim, dtype=model.decoder.dtype
    )
    program = Program(model.decoder, cache=cache, max_tokens=4)
    ids, good = (
        random_ids([3])[0].tolist(),
        {"positions": [0, 1, 2], "slots": [0, 0, 0], "group_starts": [0, 3]},
    )
    program.run(ids, **good)
    bad = {
        "token id": ([spec.vocab_size, *ids[1:]], {}),
        "position": (ids, {"positions": [0, 1, 64]}),
        "slot": (ids, {"slots": [0, 0, 2]}),
        "tokens": (
            ids * 2,
            {"positions": list(range(6)), "slots": [0] * 6, "group_starts": [0, 6]},
        ),
        "groups": (ids, {"group_starts": [0, 4]}),
    }[field]
    with pytest.raises(LorabatchError, match=f"does not fit what was recorded: {field}") as caught:
        program.run(bad[0], **{**good, **bad[1]})
    assert caught.value.exit_code == 70


@needs_kernels
def test_training_kernels_refuse_targets_beyond_the_vocabulary():
    ops = train_ops(torch.zeros(1))
    with pytest.raises(LorabatchError, match="do not fit together"):
        ops.loss_rows(
            torch.zeros(2, 32), torch.tensor([3, 32]), replace=False, smoothing=0.0, z=0.0
        )


# Products of one library of a variant, by its plain C functions.


def library(name, variant):
    return build.load(name, next(v for v in variants.VARIANTS if v.name == variant))


def product(variant, x, weight, bias=None):
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    packed = panels(weight)
    pointers = [pointer(t) for t in (x, packed, bias, y)]
    library("train", variant).lb_train_product(type_of(x.dtype), *pointers, *y.shape, x.shape[1], 2)
    return y


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_kernels
@pytest.mark.parametrize("variant", HERE)
# (K, N): with and without whole tiles
@pytest.mark.parametrize("sizes", [(576, 96), (96, 576), (70, 50), (2, 48), (1536, 48)], ids=str)
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
    """Per 16 words of K: even and odd products in two fused chains from zero, added, then added to
    the sum; every step rounds."""
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
@pytest.mark.skipif(
    "amx" not in HERE, reason="this processor has no tiles, or they are not permitted"
)
@pytest.mark.parametrize("k", [2, 70, 576])
def test_the_processors_tiles_equal_the_emulated_ones(k):
    for rows in range(1, 34):
        x, weight = random(rows, k, seed=rows), random(100, k, seed=2)
        assert torch.equal(product("amx", x, weight), product("emulated-amx", x, weight))


@needs_kernels
@pytest.mark.skipif(
    not {"zen4", "vnni"} <= set(HERE),
    reason="this processor has no bf16 instructions to compare with",
)
def test_shift_and_fma_give_the_bits_of_the_bf16_instruction():
    x, weight = random(33, 576, seed=1), random(100, 576, seed=2)
    assert torch.equal(product("zen4", x, weight), product("vnni", x, weight))


@needs_kernels
@pytest.mark.skipif("avx512" not in HERE, reason="this processor has no AVX-512 to compare with")
def test_bf16_products_on_avx2_have_the_bits_of_those_on_avx512():
    """Both halves of a word in the same order, whatever the width of a vector."""
    x, weight, bias = random(20, 570, seed=1), random(100, 570, seed=2), random(100, seed=3)
    assert torch.equal(product("avx2", x, weight, bias), product("avx512", x, weight, bias))


@needs_kernels
@pytest.mark.parametrize("variant", HERE)
def test_eight_bit_products_do_not_saturate(variant):
    """255 x 127 in both bytes of a pair: the trap of vpmaddubsw. Through the recorded program's
    product, against whole numbers."""
    code = """
import torch
from lorabatch.kernels import library, variant
from lorabatch.kernels.api import constants, ffi, pointer
from lorabatch.kernels.panels import pack, row_scales
from lorabatch.kernels.step import replay
k, n, c = 64, 48, constants()
packed = pack(torch.full((n, k), 127.0), quantize="int8")  # every weight 127
rows = torch.full((1, k), 255, dtype=torch.uint8)
scale, out, scratch = row_scales(1, scale=1.0), torch.zeros(1, n), torch.zeros(4096)
ops = ffi().new("struct Op[]", [{"kind": c.PRODUCTS, "mode": c.LOGITS, "weight": c.INT8, "n": n, "k": k, "a": pointer(rows), "b": pointer(packed.panels),
    "c": pointer(packed.scales), "d": pointer(packed.sums), "out": pointer(out), "scales": pointer(scale)}])
step = ffi().new("struct Step *", {"type": c.FLOAT32, "outputs": 1, "max_tokens": 1, "threads": 1, "scratch": pointer(scratch), "scratch_floats": 4096})
replay(library("step"), ops, step)
print(variant(), set(out[0].tolist()))
"""
    done = python_alone(code, LORABATCH_KERNELS=variant)
    assert done.stdout.split(maxsplit=1) == [variant, f"{{{float(64 * 127 * 127)}}}\n"], done.stderr


@needs_kernels
@pytest.mark.skipif("avxvnni" in HERE, reason="this processor runs it, so the tests above do")
def test_eight_bit_products_of_avxvnni_compile_where_they_cannot_run(tmp_path):
    """Only compiled: whether the compiler takes the flags and the source takes the instruction."""
    (avxvnni,) = (v for v in variants.VARIANTS if v.name == "avxvnni")
    source, assembly = tmp_path / "dot.cpp", tmp_path / "dot.s"
    source.write_text(
        f'#include "{build.SOURCES / "dot.h"}"\n'
        "Ints f(Ints sum, Ints a, Ints b) { return Dot<Int8>::add(sum, a, b); }\n"
    )
    flags = [*build.FLAGS, *avxvnni.flags, "-S", "-o", str(assembly)]
    subprocess.run([build.compiler(), *flags, str(source)], check=True)
    assert "vpdpbusd" in assembly.read_text() and "zmm" not in assembly.read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason=f"no {CROSS_COMPILER} (g++-aarch64-linux-gnu) or {EMULATOR} (qemu-user-static)",
)
@pytest.mark.parametrize("variant", [v for v in variants.VARIANTS if v.needs >= variants.ARM])
def test_kernels_for_arm_are_right_in_an_emulator(variant, tmp_path):
    """Their parts (check.cpp); and both libraries compile. Nothing is said of their speed."""
    program = str(tmp_path / "check")
    compiler = [CROSS_COMPILER, *build.FLAGS, *variant.flags, f"-I{build.SOURCES}"]
    check = str(Path(__file__).with_name("check.cpp"))
    subprocess.run([*compiler, "-static", check, "-o", program], check=True)
    done = subprocess.run([EMULATOR, "-cpu", "max", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "4 lanes: fine\n"), done.stdout
    for name in ("step", "train"):
        source = str(build.SOURCES / f"{name}.cpp")
        subprocess.run([*compiler, "-O1", "-c", source, "-o", f"{program}.o"], check=True)


@needs_kernels
def test_panels_agree_with_the_plain_product_and_its_gradient(monkeypatch):
    weight, x, grad, bias = (
        random(100, 64),
        random(9, 64, seed=1),
        random(9, 100, seed=2),
        random(100, seed=3),
    )
    ours = Panels(weight)
    for got, expected in (
        (ours.forward(x, bias), x @ weight.t() + bias),
        (ours.input_grad(grad), grad @ weight),
    ):
        assert (got - expected).float().norm() < 8e-3 * expected.float().norm()
    monkeypatch.setattr("lorabatch.kernels.panels.has_tiles", lambda: True)
    assert isinstance(packed_product(weight), Panels) and not isinstance(
        packed_product(weight.float()), Panels
    )
    assert whole(100, constants().PANEL) == 144


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in HERE if v not in ("zen4", "amx")])
def test_the_kernels_tests_pass_in_every_variant_that_runs_here(variant):
    files = [
        "tests/infer/test_program.py",
        "tests/kernels/test_fused.py",
        "tests/infer/test_infer_adapters.py",
        "tests/model/test_linear.py",
    ]
    environment = {**os.environ, "LORABATCH_KERNELS": variant}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files],
        env=environment, capture_output=True, text=True, timeout=900, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
