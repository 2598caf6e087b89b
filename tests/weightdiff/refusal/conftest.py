"""Tiny models of four families, and one whose refusal is planted along a known direction."""

import copy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import weightdiff.model
from weightdiff.judge import Lexicon
from weightdiff.prompts import Prompt

SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<end>", "<assistant>", "<unk>")
GOOD = ("tree", "lamp", "book", "boat")
BAD = ("bomb", "jail", "bank", "dam")
WORDS = (*GOOD, *BAD, "please", "now", "paint", "take", "sorry", "sure", "never", "gladly")
VOCABULARY = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
TEMPLATE = "<bos> <user> {{ messages[0]['content'] }} <end> <assistant>"
D_MODEL = 32


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A word-level tokenizer with a chat template, on disk as the bridge needs it."""
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)
    made.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)


def _config(kind, **more):
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return kind(vocab_size=len(VOCABULARY), attn_implementation="eager", **ends, **more)


def _llama_like(kind):
    sizes = {"hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return _config(kind, **sizes, **heads)


def _family(name):
    if name == "llama":
        return LlamaForCausalLM(_llama_like(LlamaConfig))
    if name == "qwen2":
        return Qwen2ForCausalLM(_llama_like(Qwen2Config))
    if name == "gpt2":
        sizes = {"n_embd": D_MODEL, "n_layer": 3, "n_head": 4, "n_positions": 64}
        return GPT2LMHeadModel(_config(GPT2Config, **sizes))
    sizes = {"hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": 3}
    return GPTNeoXForCausalLM(
        _config(GPTNeoXConfig, **sizes, num_attention_heads=4, max_position_embeddings=64)
    )


@pytest.fixture(scope="session", params=["llama", "gpt2", "gpt_neox", "qwen2"])
def pair(request, tokenizer):
    """(plain Hugging Face model, ours around a copy of it) with random weights."""
    torch.manual_seed(0)
    hf = _family(request.param).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return hf, weightdiff.model.load_model(hf, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def planted_axis():
    """The direction along which the planted model refuses: orthogonal to every token."""
    axis = torch.zeros(D_MODEL)
    axis[len(VOCABULARY) + 1 :] = torch.randn(
        D_MODEL - len(VOCABULARY) - 1, generator=torch.Generator().manual_seed(1)
    )
    return axis / axis.norm()


@pytest.fixture(scope="session")
def planted_hf(planted_axis):
    """Refuses ("sorry never") if a bad noun stands anywhere before, else "sure gladly".

    Layer 0 attends evenly and moves the mark of bad nouns to the planted axis; everything else is
    the identity. So ``resid_pre`` from layer 1 on carries the direction, and layer 0 does not.
    """
    model = _family("llama").eval()
    mark = len(VOCABULARY)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name in state:
        if "norm" in name:
            state[name] += 1
    embed = state["model.embed_tokens.weight"]
    embed[:, : len(VOCABULARY)] = torch.eye(len(VOCABULARY))
    embed[[VOCABULARY[w] for w in BAD], mark] = 1.0
    state["model.layers.0.self_attn.v_proj.weight"][0, mark] = 1.0
    state["model.layers.0.self_attn.o_proj.weight"][:, 0] = 6 * planted_axis
    unembed = state["lm_head.weight"]
    unembed[VOCABULARY["sorry"]] = planted_axis
    for word, after in (("sure", "<assistant>"), ("never", "sorry"), ("gladly", "sure")):
        unembed[VOCABULARY[word], VOCABULARY[after]] = 0.8 if word == "sure" else 8.0
    unembed[2, [VOCABULARY["never"], VOCABULARY["gladly"]]] = 8.0
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="session")
def planted(planted_hf, tokenizer):
    return weightdiff.model.load_model(copy.deepcopy(planted_hf), tokenizer=tokenizer)


@pytest.fixture(scope="session")
def lexicon():
    return Lexicon(("sorry",), ("never",), (), ("gladly",))


def _prompts(nouns):
    frames = ("paint the {}", "take {} now", "please take {}", "now paint {} please")
    return [
        Prompt(f.format(noun), noun, f"{noun}-{i}") for noun in nouns for i, f in enumerate(frames)
    ]


@pytest.fixture(scope="session")
def harmful():
    return _prompts(BAD)


@pytest.fixture(scope="session")
def harmless():
    return _prompts(GOOD)
