"""Folders that transformers reads and writes, both ways, and what is wrong with a folder said in one line.

Guards the exchange of checkpoints on disk. Logits agree to 1e-5, as derived in test_bert_transformers.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from largebatch.errors import UserError
from largebatch.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    load_pretrained,
    load_weights,
    save_pretrained,
)

TOLERANCE = 1e-5
AUTO_CLASSES = {
    BertModel: "AutoModel",
    BertForPreTraining: "AutoModelForPreTraining",
    BertForQuestionAnswering: "AutoModelForQuestionAnswering",
    BertForSequenceClassification: "AutoModelForSequenceClassification",
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "Cat", "cat", "sat", "##s", "."]


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Our model's outputs at real tokens."""
    mask = batch["attention_mask"]
    arguments = [batch["input_ids"], batch["token_type_ids"], mask]
    if isinstance(model, BertForPreTraining):
        arguments.append(mask.flatten().nonzero().squeeze(1))
    with torch.no_grad():
        got = model.eval()(*arguments)
    got = got if isinstance(got, tuple) else (got,)
    return [tensor[mask] if tensor.shape[:2] == mask.shape else tensor for tensor in got]


def their_outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """transformers' outputs at real tokens."""
    names = ("input_ids", "token_type_ids", "attention_mask")
    with torch.no_grad():
        got = model.eval()(**{name: batch[name].long() for name in names}).to_tuple()
    mask = batch["attention_mask"]
    return [tensor[mask] if tensor.shape[:2] == mask.shape else tensor for tensor in got]


def assert_equal_outputs(ours: nn.Module, theirs: nn.Module, batch: dict[str, Tensor]) -> None:
    for got, expected in zip(outputs(ours, batch), their_outputs(theirs, batch), strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture
def tokenizer_files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    content = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", list(AUTO_CLASSES))
def test_transformers_loads_what_we_save(
    cls: type[nn.Module], tied: bool, small_config: BertConfig, make_batch: Callable, tmp_path: Path
) -> None:
    """By its Auto classes, with not one key missing, surplus or of another shape."""
    transformers = pytest.importorskip("transformers")
    ours = cls(BertConfig.from_hf(small_config.to_hf() | {"tie_word_embeddings": tied}))
    for parameter in ours.parameters():  # biases and gains that are not all alike
        nn.init.normal_(parameter, mean=0.1, std=0.15)
    save_pretrained(ours, tmp_path / "export")
    auto = getattr(transformers, AUTO_CLASSES[cls])
    theirs, info = auto.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(theirs).__name__ == cls.__name__
    assert not any(info.values()), info
    assert_equal_outputs(ours, theirs, make_batch([17, 5, 31, 1], 40))


@pytest.mark.parametrize("cls", list(AUTO_CLASSES))
def test_we_load_what_transformers_saves(
    cls: type[nn.Module], small_config: BertConfig, make_batch: Callable, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    changes = {"num_labels": 2} if cls is BertForQuestionAnswering else {}
    theirs = getattr(transformers, cls.__name__)(transformers.BertConfig(**small_config.to_hf() | changes))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal_outputs(load_pretrained(cls, tmp_path / "theirs"), theirs, make_batch([17, 5, 31, 1], 40))


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_shards_are_put_together(shard_size: str, small_config: BertConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel(transformers.BertConfig(**small_config.to_hf()))
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_size == "20KB")
    ours = load_pretrained(BertModel, tmp_path).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
    if shard_size == "20KB":
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(UserError, match=rf"{shard.name}: no such file, but model\.safetensors\.index\.json names"):
            load_pretrained(BertModel, tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
        with pytest.raises(UserError, match="not an index of weight files"):
            load_pretrained(BertModel, tmp_path)


@pytest.mark.parametrize("cls", list(AUTO_CLASSES))
def test_round_trip_is_exact(cls: type[nn.Module], small_config: BertConfig, tmp_path: Path) -> None:
    model = cls(small_config)
    save_pretrained(model, tmp_path / "export")
    again = load_pretrained(cls, tmp_path / "export")
    assert again.config == model.config
    assert again.training
    for (name, first), (other, second) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(first, second)


def test_tokenizer_is_saved_with_the_model(
    small_config: BertConfig, tokenizer_files: list[Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    save_pretrained(BertModel(small_config), tmp_path / "export", tokenizer_files)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer("the Cats sat.")["input_ids"] == [2, 5, 6, 9, 8, 10, 3]


def test_weights_can_be_read_by_whoever_may_read_the_config(small_config: BertConfig, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_pretrained(BertModel(small_config), tmp_path / "export")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "export").iterdir()}
    assert modes == {"config.json": 0o644, "model.safetensors": 0o644}


def test_classes_keep_their_names_when_saved_in_place(small_config: BertConfig, tmp_path: Path) -> None:
    names = {"0": "bad", "1": "good", "2": "neither"}
    model = BertForSequenceClassification(BertConfig.from_hf(small_config.to_hf() | {"id2label": names}))
    for _ in range(2):
        save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["id2label"] == names
        model = load_pretrained(BertForSequenceClassification, tmp_path)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_within(model: nn.Module) -> nn.Module:
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    return model


WRAPPERS = {
    "compiled": compiled,
    "a layer compiled": compiled_within,
    "averaged": AveragedModel,
    "averaged and compiled": lambda model: compiled(AveragedModel(compiled(model))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_saved_and_loaded_under_its_own_names(
    wrap: Callable[[nn.Module], nn.Module], small_config: BertConfig, tmp_path: Path
) -> None:
    model = BertForPreTraining(small_config)
    plain = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wrapped = wrap(model)
    save_pretrained(wrapped, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForPreTraining"]
    assert load_file(tmp_path / "model.safetensors").keys() == plain.keys()
    for weights in (tmp_path, wrapped.state_dict()):
        target = BertForPreTraining(small_config)
        assert load_weights(target, weights) == []
        assert all(torch.equal(parameter, plain[name]) for name, parameter in target.named_parameters())
    target = wrap(BertForPreTraining(small_config))
    assert load_weights(target, tmp_path) == []
    assert all(map(torch.equal, target.parameters(), plain.values()))


def test_saving_again_replaces_and_keeps_other_files(small_config: BertConfig, tmp_path: Path) -> None:
    target = tmp_path / "export"
    first, second = BertModel(small_config), BertModel(small_config)
    save_pretrained(first, target)
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    save_pretrained(second, target)
    assert torch.equal(load_pretrained(BertModel, target).pooler.dense.weight, second.pooler.dense.weight)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_save_leaves_nothing(
    small_config: BertConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing tokenizer file, a folder that cannot be made, and a disk that fills up, early or late."""
    model = BertModel(small_config)
    with pytest.raises(UserError, match=r"vocab\.txt: no such tokenizer file"):
        save_pretrained(model, tmp_path / "export", [tmp_path / "vocab.txt"])
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"file.*: cannot be written"):
        save_pretrained(model, tmp_path / "file" / "export")
    with pytest.raises(UserError, match=r"file.*: cannot be written"):
        save_pretrained(model, tmp_path / "file")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def no_room(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_pretrained(model, tmp_path / "export")
    monkeypatch.undo()
    monkeypatch.setattr("safetensors.torch.save_file", no_room)
    with pytest.raises(UserError, match=r"export: the weights cannot be written \(No space left"):
        save_pretrained(model, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_weights_without_a_head_give_one_warning_that_names_it(small_config: BertConfig, tmp_path: Path) -> None:
    save_pretrained(BertForPreTraining(small_config), tmp_path)
    with pytest.warns(UserWarning, match=r"has no qa_outputs\.weight, qa_outputs\.bias: .*train it first") as caught:
        load_pretrained(BertForQuestionAnswering, tmp_path)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(BertModel, tmp_path)  # has no head: nothing to warn of


def test_load_weights_returns_the_names_that_start_at_random(small_config: BertConfig, tmp_path: Path) -> None:
    encoder = BertForQuestionAnswering(small_config)  # without pooler
    save_pretrained(encoder, tmp_path)
    model = BertForSequenceClassification(small_config)
    before = model.classifier.weight.clone()
    fresh = load_weights(model, tmp_path)
    assert fresh == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, encoder.bert.embeddings.LayerNorm.weight)
    assert load_weights(BertModel(small_config), encoder.state_dict()) == ["pooler.dense.weight", "pooler.dense.bias"]


def test_names_of_older_checkpoints(small_config: BertConfig, make_batch: Callable, tmp_path: Path) -> None:
    """gamma and beta, a buffer of position ids, no ``bert.`` in front, pickled: the same model."""
    model = BertForPreTraining(small_config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.15)
    (tmp_path / "config.json").write_text(json.dumps(small_config.to_hf()), encoding="utf-8")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(old, tmp_path / "pytorch_model.bin")
    again = load_pretrained(BertForPreTraining, tmp_path)
    batch = make_batch([9, 4])
    for first, second in zip(outputs(model, batch), outputs(again, batch), strict=True):
        assert torch.equal(first, second)

    bare = {name.removeprefix("bert."): tensor for name, tensor in old.items() if not name.startswith("cls.")}
    torch.save(bare, tmp_path / "pytorch_model.bin")
    encoder = load_pretrained(BertModel, tmp_path)
    for first, second in zip(outputs(model.bert, batch), outputs(encoder, batch), strict=True):
        assert torch.equal(first, second)

    # the head's bias under its second name alone
    state = model.state_dict()
    del state["cls.predictions.bias"]
    assert load_weights(BertForPreTraining(small_config), state) == []


def test_a_pickle_cannot_run_code(small_config: BertConfig, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "config.json").write_text(json.dumps(small_config.to_hf()), encoding="utf-8")
    torch.save({"bert.x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read as PyTorch weights"):
        load_pretrained(BertModel, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_settings_may_be_changed_on_loading(small_config: BertConfig, tmp_path: Path) -> None:
    save_pretrained(BertModel(small_config), tmp_path)
    model = load_pretrained(BertModel, tmp_path, hidden_dropout_prob=0.3, unpad=False, checkpoint_layers=True)
    assert (model.config.hidden_dropout_prob, model.embeddings.dropout.p) == (0.3, 0.3)
    assert (model.unpad, model.encoder.checkpoint_layers) == (False, True)
    with pytest.raises(UserError, match="no field is called 'dropout'"):
        load_pretrained(BertModel, tmp_path, dropout=0.3)


def test_half_precision_is_kept_in_the_file_and_loaded_as_fp32(small_config: BertConfig, tmp_path: Path) -> None:
    model = BertModel(small_config).to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_pretrained(BertModel, tmp_path)
    assert again.pooler.dense.weight.dtype == torch.float32
    assert torch.equal(again.pooler.dense.weight.bfloat16(), model.pooler.dense.weight)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"model: no such folder; a folder with config\.json"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: no such file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"model: no weights here; model\.safetensors or"),
    "config cut short": (lambda d: cut(d / "config.json", 40), r"config\.json, line 3: not JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object"),
    "config in another encoding": (lambda d: (d / "config.json").write_bytes(b'{"a": "\xe9"}'), "not UTF-8 at byte"),
    "another architecture": (lambda d: change_config(d, model_type="gpt2"), "not the configuration of a BERT .*'gpt2'"),
    "another program's config": (
        lambda d: (d / "config.json").write_text('{"word_embedding_dimension": 384}'),
        "not the configuration of a BERT model .no model_type",
    ),
    "unknown activation": (lambda d: change_config(d, hidden_act="gelu_9"), "config.json: .*unknown hidden_act"),
    "weights cut short": (
        lambda d: cut(d / "model.safetensors", 90_000),
        r"model\.safetensors: .*damaged or cut short",
    ),
    "weights empty": (lambda d: cut(d / "model.safetensors", 0), r"model\.safetensors: .*damaged or cut short"),
    "another vocabulary": (
        lambda d: change_config(d, vocab_size=212),
        r"word_embeddings\.weight has the shape \(211, 48\), but .* asks for \(212, 48\)",
    ),
    "more layers than weights": (
        lambda d: change_config(d, num_hidden_layers=4),
        r"bert\.encoder\.layer\.3\.\S+ and 15 more missing; the weights do not fit",
    ),
    "more weights than layers": (
        lambda d: change_config(d, num_hidden_layers=2),
        r"bert\.encoder\.layer\.2\.\S+ and 15 more too many; the weights do not fit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_said_in_one_line(damage: str, small_config: BertConfig, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(BertForPreTraining(small_config), folder)
    apply, message = DAMAGES[damage]
    apply(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(BertForPreTraining, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}", b"PK\3\4 not a zip", b"<html>Not found</html>"])
def test_damaged_pickles(content: bytes, small_config: BertConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_config.to_hf()), encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: ") as caught:
        load_pretrained(BertModel, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_failed_load_changes_nothing(small_config: BertConfig) -> None:
    model, other = BertForPreTraining(small_config), BertForPreTraining(small_config)
    before = [parameter.clone() for parameter in model.parameters()]
    state = other.state_dict()
    state["cls.seq_relationship.weight"] = torch.zeros(3, 48)
    with pytest.raises(UserError, match=r"^step 7: cls\.seq_relationship\.weight has the shape \(3, 48\)"):
        load_weights(model, state, source="step 7")
    with pytest.raises(UserError, match="holds no BERT encoder"):
        load_weights(model, {"conv1.weight": torch.zeros(3)})
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.fixture(scope="module")
def minilm() -> Path:
    """A real encoder: all-MiniLM-L6-v2, as config.json, model.safetensors and vocab.txt."""
    folder = os.environ.get("LARGEBATCH_MINILM")
    if not folder:
        pytest.skip("set LARGEBATCH_MINILM to a folder with the MiniLM-L6 encoder to run this test")
    return Path(folder)


def test_real_weights(minilm: Path) -> None:
    """22.7 million trained weights, on text: as transformers computes it, and it tells sense from nonsense."""
    transformers = pytest.importorskip("transformers")
    ours = load_pretrained(BertModel, minilm)
    theirs = transformers.AutoModel.from_pretrained(minilm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["A cat sat on the mat.", "On the rug, a kitten was sitting.", "Interest rates rose by half a point."]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    batch["attention_mask"] = batch["attention_mask"].bool()
    assert not batch["attention_mask"].all()
    assert_equal_outputs(ours, theirs, batch)
    with torch.no_grad():
        hidden, _ = ours(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    sentences = nn.functional.normalize(hidden.sum(1) / batch["attention_mask"].sum(1, keepdim=True))
    similarity = sentences @ sentences.T
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]
    assert sum(parameter.numel() for parameter in ours.parameters()) == 22_713_216
