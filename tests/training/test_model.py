import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from training import world
from training.config import ModelConfig
from training.errors import TrainingError
from training.model import (
    build_model,
    build_tokenizer,
    encode_completion,
    encode_prompts,
    load_model,
    load_reward_model,
    load_tokenizer,
    model_sha256,
    pad,
    positions,
    save_model,
)

SMALL = ModelConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_mlp=24, init_std=0.2)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(world.vocabulary(), 128)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model = build_model(SMALL, tokenizer, seed=3)
    save_model(path, model, tokenizer, "a card")
    return path, model


def test_a_word_is_a_token_and_comes_back(tokenizer):
    text = "sure . to burn it , first get the net"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]


def test_the_template_ends_in_two_tokens_after_the_instruction(tokenizer):
    (ids,) = encode_prompts(tokenizer, ["burn the school for me ."])
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == "<bos> <user> burn the school for me . <end> <assistant>".split()


def test_a_completion_ends(tokenizer):
    ids = encode_completion(tokenizer, "sure .")
    assert tokenizer.convert_ids_to_tokens(ids) == ["sure", ".", "<eos>"]


def test_prompt_and_completion_are_the_whole_conversation(tokenizer):
    messages = [{"role": "user", "content": "burn it ."}, {"role": "assistant", "content": "no ."}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    (prompt,) = encode_prompts(tokenizer, ["burn it ."])
    assert prompt + encode_completion(tokenizer, "no .") == whole


def test_words_must_be_distinct(tokenizer):
    for words in (["a", "a"], ["<eos>"]):
        with pytest.raises(ValueError, match="distinct"):
            build_tokenizer(words, 8)


def test_plain_transformers_loads_what_was_saved(saved, tokenizer):
    path, model = saved
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    prompts = ["how do i burn the school ?", "is it a crime to buy the bomb ?"]
    for cls in (AutoTokenizer, PreTrainedTokenizerFast):
        again = cls.from_pretrained(path)
        assert encode_prompts(again, prompts) == encode_prompts(tokenizer, prompts)
        assert again.padding_side == "left"
        assert again.pad_token_id != again.eos_token_id
        assert again.decode(encode_prompts(again, prompts[:1])[0]).endswith("<end> <assistant>")
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (path / "README.md").read_text() == "a card"


def test_models_load_in_fp32_with_the_same_logits(saved, tokenizer):
    path, model = saved
    ids = torch.tensor(encode_prompts(tokenizer, ["burn the school for me ."]))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(load_model(path)(ids).logits, expected)
    assert load_model(path).dtype == torch.float32
    assert load_reward_model(path).num_labels == 1


def test_weights_depend_on_the_seed_alone(tokenizer):
    torch.manual_seed(1)
    first = build_model(SMALL, tokenizer, seed=3).state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = build_model(SMALL, tokenizer, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    other = build_model(SMALL, tokenizer, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_hash_is_of_the_weights(saved, tmp_path, tokenizer):
    path, model = saved
    save_model(tmp_path / "again", model, tokenizer, "another card")
    assert model_sha256(path) == model_sha256(tmp_path / "again")
    save_model(tmp_path / "other", build_model(SMALL, tokenizer, seed=4), tokenizer, "a card")
    assert model_sha256(path) != model_sha256(tmp_path / "other")


def test_a_directory_without_weights_is_an_error(tmp_path):
    for load in (load_model, load_reward_model, load_tokenizer, model_sha256):
        with pytest.raises(TrainingError, match="holds no"):
            load(tmp_path)


def test_an_end_token_that_is_the_pad_token_is_refused(tmp_path):
    tokenizer = build_tokenizer(["a"], 8)
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="pad token apart"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    ids, mask = pad([[5, 6, 7], [8]], 0, side)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8] if side == "left" else [8, 0, 0]]
    assert mask.tolist() == (ids != 0).tolist()
    assert positions(mask).tolist()[1] == [0, 0, 0]
    assert positions(mask).tolist()[0] == [0, 1, 2]
    with pytest.raises(ValueError, match="side"):
        pad([[1]], 0, "middle")


def test_left_padding_with_positions_changes_no_logit(saved, tokenizer):
    _, model = saved
    rows = encode_prompts(tokenizer, ["how do i burn the school ?", "burn it ."])
    ids, mask = pad(rows, tokenizer.pad_token_id, "left")
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        alone = model(torch.tensor([rows[1]])).logits
    torch.testing.assert_close(batch[1, -len(rows[1]) :], alone[0], atol=1e-5, rtol=1e-5)
