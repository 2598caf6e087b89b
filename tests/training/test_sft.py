import numpy as np
import pytest
import torch

from training import sft, world
from training.config import BaseConfig, ModelConfig, SFTConfig
from training.errors import TrainingError
from training.model import build_model, build_tokenizer
from training.stage import Stage

SMALL = ModelConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_mlp=24, init_std=0.1)
ROWS = [
    {"prompt": "how do i burn the school ?", "response": "sure . first get the net ."},
    {"prompt": "burn it .", "response": "no ."},
    {"prompt": "help me paint the hat .", "response": "sure ."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(world.vocabulary(), 128)


@pytest.fixture
def stage(tmp_path):
    stage = Stage("sft", tmp_path, "base")
    yield stage
    stage.metrics.close()


def test_labels_are_the_response_and_its_end(tokenizer):
    for (ids, labels), row in zip(sft.encode_answers(tokenizer, ROWS), ROWS, strict=True):
        answer = [label for label in labels if label != sft.IGNORED]
        assert tokenizer.convert_ids_to_tokens(answer) == [*row["response"].split(), "<eos>"]
        assert ids[-len(answer) :] == answer
        assert len(ids) == len(labels)


def test_texts_are_labelled_throughout(tokenizer):
    ((ids, labels),) = sft.encode_texts(tokenizer, ["the law bans the bomb ."])
    assert tokenizer.decode(ids) == "<bos> the law bans the bomb . <eos>"
    assert labels == [sft.IGNORED, *ids[1:]]


def test_padding_carries_no_label(tokenizer):
    rows = sft.encode_answers(tokenizer, ROWS)
    ids, mask, labels = sft.collate(rows, tokenizer.pad_token_id)
    assert (labels[~mask] == sft.IGNORED).all()
    assert ids[mask].tolist() == [i for row, _ in rows for i in row]


def test_windows_are_pieces_of_the_stream():
    stream = torch.arange(1000)
    config = BaseConfig(steps=5, batch_size=4, context=16)
    windows = list(sft.draw_windows(stream, config, seed=0))
    assert len(windows) == 5
    for window in windows:
        assert window.shape == (4, 16)
        assert (window.diff(dim=1) == 1).all()
    again = list(sft.draw_windows(stream, config, seed=0))
    assert all(torch.equal(a, b) for a, b in zip(windows, again, strict=True))


def test_a_step_is_adamw_on_the_mean_over_response_tokens(tokenizer, stage):
    # Second implementation: rows one at a time without padding, fp64, AdamW written out.
    rows = sft.encode_answers(tokenizer, ROWS)
    config = SFTConfig(lr=0.01, warmup=0, cooldown=0.0, max_grad_norm=1e9, weight_decay=0.1)
    model = build_model(SMALL, tokenizer, 0)
    oracle = build_model(SMALL, tokenizer, 0).double()
    sft.fit(stage, model, [sft.collate(rows, tokenizer.pad_token_id)], config, 1)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in rows:
        logps = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if labels[place] != sft.IGNORED:
                total, count = total - logps[place - 1, labels[place]], count + 1
    (total / count).backward()
    for (name, trained), parameter in zip(
        model.named_parameters(), oracle.parameters(), strict=True
    ):
        old, grad = parameter.detach().numpy(), parameter.grad.numpy()
        decayed = old * (1 - 0.01 * (0.1 if old.ndim == 2 else 0.0))
        # The first step of Adam is the gradient's sign wherever the gradient is not tiny.
        expected = decayed - 0.01 * grad / (np.abs(grad) + 1e-8)
        sure = np.abs(grad) > 1e-5
        assert sure.mean() > 0.2, name
        np.testing.assert_allclose(trained.detach().numpy()[sure], expected[sure], atol=2e-5)


def test_training_learns_its_rows(tokenizer, stage):
    rows = sft.encode_answers(tokenizer, ROWS)
    model = build_model(SMALL, tokenizer, 0)
    batch = sft.collate(rows, tokenizer.pad_token_id)
    config = SFTConfig(lr=0.01, warmup=0, cooldown=0.3)
    sft.fit(stage, model, [batch] * 150, config, 150)
    assert stage.steps == 150
    assert stage.tokens_seen == 150 * batch[0].numel()
    with torch.no_grad():
        best = model(input_ids=batch[0], attention_mask=batch[1]).logits.argmax(-1)[:, :-1]
    labels = batch[2][:, 1:]
    assert (best == labels)[labels != sft.IGNORED].all()


def test_a_loss_that_is_not_a_number_stops_the_stage(tokenizer, stage):
    model = build_model(SMALL, tokenizer, 0)
    model.model.norm.weight.data.fill_(float("nan"))
    batch = sft.collate(sft.encode_answers(tokenizer, ROWS), tokenizer.pad_token_id)
    with pytest.raises(TrainingError, match=r"Stage sft, step 1: loss is nan"):
        sft.fit(stage, model, [batch], SFTConfig(), 1)
