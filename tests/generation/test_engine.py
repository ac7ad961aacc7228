"""Cached reading against a whole forward pass, greedy continuations against transformers', sampling against frequencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.checkpoint.weights import load_module
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.generation.cache import Reader
from megarewarm.generation.continuation import Continuer
from megarewarm.generation.packed import with_packed_layers
from megarewarm.generation.sampling import Sampling, text_keys, uniforms
from megarewarm.model.transformer import Transformer
from tests.support.families import CONFIGS, saved
from tests.support.family_shapes import SHAPES, shape

NEOX = {"neox": True, "neox, sequential": False}
GREEDY = Sampling(temperature=0)


def written(name: str, folder: Path) -> PreTrainedModel:
    """transformers' model of a family, saved in ``folder``."""
    if name not in NEOX:
        return saved(name, folder)
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "hidden_size": 36,
        "num_attention_heads": 3,
        "intermediate_size": 52,
        "vocab_size": 61,
    }
    sizes |= {"max_position_embeddings": 64, "rotary_pct": 0.5, "use_parallel_residual": NEOX[name]}
    settings = GPTNeoXConfig(**sizes)
    model = GPTNeoXForCausalLM(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + float(parameter.dim() == 1))
    model.save_pretrained(folder)
    return model


def loaded(folder: Path) -> Transformer:
    source = open_checkpoint(str(folder))
    return load_module(source.weights, source.model_config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", [*NEOX, *CONFIGS])
def test_greedy_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Prompts of several lengths, one of them longer than a window, so that the short ones are padded; packed and not."""
    theirs: Any = written(name, tmp_path)
    ours = loaded(tmp_path)
    random = np.random.default_rng(5)
    prompts = [random.integers(3, 61, size).tolist() for size in (1, 11, 4)]
    *found, first = Continuer(ours)([*prompts, prompts[0]], 21, GREEDY, text_keys(0, range(4)), None)
    assert first.tolist() == found[0].tolist()
    for prompt, ids in zip(prompts, found, strict=True):
        alone = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=21,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ids.tolist() == alone[0, len(prompt) :].tolist()
    end = int(found[1][6])  # the text that has it first ends there, and the others go on
    again = Continuer(ours)(prompts, 21, GREEDY, text_keys(0, range(3)), end)
    for whole, cut in zip(found, again, strict=True):
        ends = np.flatnonzero(whole == end)
        assert cut.tolist() == whole[: ends[0] + 1 if ends.size else None].tolist()


@pytest.mark.parametrize("name", ["neox", *SHAPES])
def test_cached_states_are_those_of_the_whole(name: str) -> None:
    """In pieces of any size, with rows dropped on the way, padded and not."""
    plain = {"num_layers": 3, "hidden_size": 24, "num_heads": 3, "vocab_size": 67, "rotary_fraction": 0.5}
    config = ModelConfig.model_validate({**(plain if name == "neox" else shape(name, 3)), "max_positions": 200})
    torch.manual_seed(1)
    model = Transformer(config).double()
    ids = torch.randint(0, 67, (4, 150))
    starts = torch.tensor([0, 3, 9, 1])
    with torch.inference_mode():
        for begins in (None, starts):
            expected = model(
                ids, None if begins is None else begins[:, None].expand(4, 150) * (torch.arange(150) >= begins[:, None])
            )
            reader, rows, first = Reader(model, 4, 150, begins), torch.arange(4), 0
            for size in (10, 1, 1, 60, 1, 7, 1, 1, 68):
                state = reader.read(ids[rows, first : first + size])
                first += size
                assert torch.allclose(state, expected[rows, first - 1], rtol=1e-10, atol=1e-10), first
                if first in (12, 79):
                    reader.keep(torch.tensor([2, 0]))
                    rows = rows[[2, 0]]
                    if first == 79:
                        break
        with pytest.raises(ValueError, match="room was asked for 150"):
            reader.read(torch.zeros(len(rows), 150, dtype=torch.int64))


def test_a_random_number_belongs_to_a_text_and_a_position() -> None:
    keys = text_keys(7, range(1000))
    numbers = np.stack([uniforms(keys, position) for position in range(50)])
    assert np.array_equal(uniforms(text_keys(7, range(990, 1010)), 3)[:10], numbers[3, 990:])
    assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert (np.square(counts - 2500) / 2500).sum() < 45  # chi-squared with 19 degrees: 0.1 % lie above 43.8


@pytest.mark.parametrize("size", [1, 5, 256, 300, 1031])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.9), (1.0, 0.05), (5.0, 0.999)])
def test_ids_come_as_often_as_their_probabilities_say(size: int, temperature: float, top_p: float) -> None:
    """Evenly spaced numbers hit each id in proportion to its probability, as float64 and a sort say: exactly, not by chance."""
    torch.manual_seed(size)
    logits, draws = 2 * torch.randn(1, size), 20_000
    exact = torch.softmax(logits[0].double() / temperature, 0)
    order = exact.argsort(descending=True)
    before = exact[order].cumsum(0) - exact[order]
    exact[order[before >= top_p]] = 0
    exact /= exact.sum()
    numbers = (np.arange(draws) + 0.5) / draws
    ids = torch.cat([Sampling(temperature, top_p)(logits.expand(500, size), part) for part in numbers.reshape(-1, 500)])
    counts = torch.bincount(ids, minlength=size)
    assert (counts - draws * exact).abs().max() <= 1.5
    assert not counts[exact == 0].any()


@pytest.mark.parametrize("size", [1, 255, 256, 300, 1031])
def test_the_likeliest_id_is_the_first_of_those_that_are_equally_likely(size: int) -> None:
    logits = torch.randint(-3, 3, (200, size), generator=torch.Generator().manual_seed(size)).float()
    assert GREEDY(logits, np.zeros(200)).tolist() == logits.numpy().argmax(-1).tolist()


def test_packed_products_share_all_but_the_products() -> None:
    torch.manual_seed(2)
    model = Transformer(ModelConfig.model_validate(shape("olmo2", 2)))
    packed = with_packed_layers(model)
    assert not any(isinstance(part, torch.nn.Linear) for part in packed.layers.modules())
    ids = torch.randint(0, 60, (5, 9))
    with torch.inference_mode():
        states = [Reader(which, 5, 9).read(ids) for which in (model, packed)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    assert any(isinstance(part, torch.nn.Linear) for part in model.layers.modules())
    assert packed.embed_in is model.embed_in and packed.layers[1].mlp_norm is model.layers[1].mlp_norm


def test_extreme_logits() -> None:
    """Ids of no probability are never taken, whatever the number; a flat distribution needs the whole vocabulary."""
    logits = torch.full((3, 700), -1e4)
    logits[0, 699] = logits[1, 0] = logits[2, 300] = 0.0
    for number in (0.0, 0.5, 1 - 2**-53):
        for top_p in (1.0, 0.9):
            assert Sampling(1.0, top_p)(logits, np.full(3, number)).tolist() == [699, 0, 300]
    flat = Sampling(1.0, 0.999)(torch.zeros(2, 5000), np.array([0.0, 1 - 2**-53]))
    assert len(set(flat.tolist())) == 2
    broken = Transformer(ModelConfig.model_validate(shape("llama", 1)))
    with torch.no_grad():
        broken.embed_in.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite after 0 new ids"):
        Continuer(broken)([[1]], 3, GREEDY, text_keys(0, range(1)), None)


def test_a_text_is_the_same_in_any_company() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.model_validate(shape("mistral", 2, init_std=0.3)))
    keys, sampling, continued = text_keys(1, range(9)), Sampling(1.0, 0.9), Continuer(model, limit=60)
    prompts = [[i + 1] * (i + 1) for i in range(9)]
    together = continued(prompts, 30, sampling, keys, 5)
    assert any(ids[-1] == 5 for ids in together) and max(ids.max() for ids in together) < 60
    for i in range(9):
        (alone,) = continued([prompts[i]], 30, sampling, keys[i : i + 1], 5)
        assert alone.tolist() == together[i].tolist()
