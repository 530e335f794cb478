"""Keys that are moved to another position, against the model's own; and which models are refused."""

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="needs the extra async-kv-cache[transformers]")
rotary = pytest.importorskip("async_cache.integrations.rotary")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
TOKENS = 100


def make(kind="Llama", dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | sizes, name_or_path="tiny")
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return make()


@torch.no_grad()
def keys_at(model, start):
    """The keys of the same tokens from a position on, of shape (layers, heads, tokens, width)."""
    kv = transformers.DynamicCache(config=model.config)
    ids = torch.arange(TOKENS)[None] * 7 % 64
    model(ids, position_ids=torch.arange(start, start + TOKENS)[None], cache=kv)
    return torch.cat([layer.keys for layer in kv.layers])


def move(keys, turn):
    moved = torch.empty_like(keys)
    rotary.turned(keys, turn, moved)
    return moved


def apart(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("to", [0, 37, 512, 2048, 6000])
@pytest.mark.parametrize("start", [0, 300])
def test_moved_keys_are_those_that_the_model_computes_there(model, start, to):
    turns = rotary.Rotary(model)
    moved, there = move(keys_at(model, start), turns.turn(start, to, TOKENS)), keys_at(model, to)
    assert apart(moved, there) <= 2e-5
    assert (moved[0] - there[0]).abs().max() <= 5e-6


def test_to_move_in_pieces_is_to_move_at_once_bit_by_bit(model):
    turns, keys = rotary.Rotary(model), keys_at(model, 0)
    at_once = move(keys, turns.turn(0, 2048, TOKENS))
    for size in (1, 7, 32):
        pieces = [
            move(keys[:, :, begin : begin + size], turns.turn(begin, 2048 + begin, min(size, TOKENS - begin)))
            for begin in range(0, TOKENS, size)
        ]
        assert torch.equal(torch.cat(pieces, dim=2), at_once)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda turns: turns.turn(0, 513, TOKENS),  # off by one
        lambda turns: turns.turn(512, 0, TOKENS),  # the wrong way
        lambda turns: turns.turn(0, 0, TOKENS),  # not at all
    ],
)
def test_keys_tell_a_wrong_move(model, wrong):
    keys = keys_at(model, 0)
    assert apart(move(keys, wrong(rotary.Rotary(model))), keys_at(model, 512)) > 0.1


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_fixed_scaling_is_carried(scaling):
    model = make(rope_parameters={"rope_theta": 10_000.0, **scaling})
    moved = move(keys_at(model, 5), rotary.Rotary(model).turn(5, 2048, TOKENS))
    assert apart(moved, keys_at(model, 2048)) <= 5e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_measured_as_such(dtype):
    rotary.Rotary(make(dtype=dtype))


def test_partial_rotary_is_carried():
    model = make("StableLm", partial_rotary_factor=0.25)
    keys, turn = keys_at(model, 0), rotary.Rotary(model).turn(0, 512, TOKENS)
    assert turn.cos.shape[-1] < keys.shape[-1]
    assert apart(move(keys, turn), keys_at(model, 512)) <= 2e-5


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("GPTBigCode", {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 2048}, "it has no rotary positions"),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "it has no rotary positions"),
        ("Cohere", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "is not the same, turned"),  # in pairs
    ],
)
def test_a_model_of_which_the_keys_cannot_be_moved_so_is_refused(kind, sizes, why):
    with pytest.raises(ValueError, match=f"'tiny' cannot have its KV moved: .*{why}"):
        rotary.Rotary(make(kind, **sizes))
