"""Loading, adding tokens, choosing a template, saving: what the tuned model's users get is what was trained."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from chronicals.config import TrainConfig
from chronicals.data import templates
from chronicals.data.chat import render
from chronicals.data.conversation import RawText
from chronicals.data.tokenizer import load_tokenizer
from chronicals.errors import UserError
from tests.data.test_chat_masks import CHAT, GOLDEN, load, pieces, trained
from tests.data.toy_tokenizers import byte_level, sentencepiece_like

OWN = "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>' }}{% endfor %}"


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(UserError) as error:
        load(folder, **options)
    return str(error.value)


def test_template_of_the_tokenizer_is_the_default(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>", chat_template=OWN))
    assert (chat.template_name, chat.chat_template) == ("tokenizer_default", OWN)
    assert load(tmp_path, chat_template="tokenizer_default").chat_template == OWN
    assert load(tmp_path, chat_template="tokenizer_default_fallback_chatml").chat_template == OWN
    assert load(tmp_path, chat_template="alpaca").template_name == "alpaca"


def test_template_from_the_config(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(OWN)
    folder = byte_level(tmp_path / "model", bos="<s>", eos="</s>")
    assert load(folder, chat_template="jinja", chat_template_jinja=OWN).chat_template == OWN
    assert load(folder, chat_template="jinja", chat_template_jinja=str(file)).chat_template == OWN
    assert load(folder, chat_template="tokenizer_default_fallback_llama3").template_name == "llama3"
    config = TrainConfig(base_model=str(folder), datasets=[{"path": "x.jsonl", "chat_template": "alpaca"}] * 2)
    assert load_tokenizer(config).template_name == "alpaca"


def test_template_of_one_data_set(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>", adds_bos=True), chat_template="chatml")
    assert pieces(chat, render(chat.with_template("alpaca"), CHAT)) == GOLDEN["alpaca"]
    with pytest.raises(UserError) as error:
        chat.with_template("gemma")
    assert str(error.value) == (
        "chat_template gemma of a data set needs <start_of_turn>, <end_of_turn>, which the tokenizer lacks; "
        "set chat_template: gemma for the whole run, or add the tokens under `tokens`"
    )


def test_markers_are_added_as_single_tokens(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, special=("<|im_start|>",), eos="</s>"), chat_template="chatml")
    assert chat.added_tokens == 1
    assert chat.vocab_size == len(chat.tokenizer)
    assert chat.eot_ids == (chat.vocab_size - 1,)
    assert chat.tokenizer.encode("Hi<|im_end|>Hi", add_special_tokens=False).count(chat.eot_ids[0]) == 1
    assert load(byte_level(tmp_path / "other", eos="</s>"), chat_template="alpaca").added_tokens == 0


def test_special_tokens_and_tokens(tmp_path: Path) -> None:
    special = {"eos_token": "<end>", "pad_token": "<pad>", "additional_special_tokens": ["<tool>"]}
    chat = load(
        byte_level(tmp_path, eos="</s>"), special_tokens=special, tokens=["Hello there"], chat_template="alpaca"
    )
    assert (chat.tokenizer.eos_token, chat.eot_tokens) == ("<end>", ("<end>",))
    assert chat.pad_id == chat.tokenizer.pad_token_id == chat.tokenizer.convert_tokens_to_ids("<pad>")
    assert chat.added_tokens == 4
    assert trained(chat, render(chat, RawText("Hi", "<tool>Hello there"))) == ["<tool>Hello there<end>"]
    assert sum(render(chat, RawText("Hi", "<tool>Hello there")).loss_mask) == 3


@pytest.mark.parametrize(
    ("tokens", "pad"), [({"eos": "</s>", "pad": "<pad>"}, "<pad>"), ({"eos": "</s>"}, "</s>"), ({}, None)]
)
def test_pad(tokens: dict[str, str], pad: str | None, tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, **tokens))
    assert chat.pad_id == (0 if pad is None else chat.tokenizer.convert_tokens_to_ids(pad))


def test_generation_stops_at_the_end_of_turn(tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, eos="</s>"), chat_template="chatml", eot_tokens=["<|im_start|>"])
    end, start, eos = chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "</s>"])
    assert chat.generation_config({}) == {"eos_token_id": [end, start, eos]}
    base = {"temperature": 0.6, "eos_token_id": [7, eos]}
    assert chat.generation_config(base) == {"temperature": 0.6, "eos_token_id": [end, start, 7, eos]}
    plain = load(tmp_path)
    assert plain.generation_config({"eos_token_id": eos}) == {"eos_token_id": eos}


@pytest.mark.parametrize("name", GOLDEN)
def test_saved_tokenizer_renders_what_was_trained(name: str, tmp_path: Path) -> None:
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>", adds_bos=True), chat_template=name)
    render(chat.with_template("alpaca"), CHAT)
    chat.save(tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.apply_chat_template(CHAT.messages)["input_ids"] == render(chat, CHAT).tokens
    prompt = saved.apply_chat_template(CHAT.messages[:4], add_generation_prompt=True)["input_ids"]
    document = render(chat, CHAT)
    assert document.tokens[: len(prompt)] == prompt  # inference starts where the last answer's training does
    assert document.loss_mask[len(prompt)] and not document.loss_mask[len(prompt) - 1]
    assert load(tmp_path / "out").fingerprint() == chat.fingerprint()


def test_sentencepiece_like_saved(tmp_path: Path) -> None:
    chat = load(sentencepiece_like(tmp_path), chat_template="mistral")
    chat.save(tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.apply_chat_template(CHAT.messages)["input_ids"] == render(chat, CHAT).tokens


def test_the_models_config_decides_the_tokenizers_class(tmp_path: Path) -> None:
    """transformers splits digits for a Qwen2 model whatever the tokenizer's file says: then we do too."""
    numbers = RawText("", "search 1234")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    folder = byte_level(tmp_path / "tokenizer", eos="</s>", special=("<|endoftext|>",))
    alone = load(folder)
    config = TrainConfig(base_model=str(model), tokenizer_config=str(folder), datasets=[{"path": "x.jsonl"}])
    chat = load_tokenizer(config)
    chat.save(model)
    saved = AutoTokenizer.from_pretrained(model)
    assert type(chat.tokenizer) is type(saved)
    assert type(chat.tokenizer) is not type(alone.tokenizer)
    assert render(chat, numbers).tokens == [*saved("search 1234")["input_ids"], saved.eos_token_id]


def test_fingerprint(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "a", bos="<s>", eos="</s>")
    chat = load(folder, chat_template="chatml")
    assert chat.fingerprint() == load(folder, chat_template="chatml").fingerprint()
    twin = byte_level(tmp_path / "b", bos="<s>", eos="</s>")
    assert chat.fingerprint() == load(twin, chat_template="chatml").fingerprint()
    others = [
        load(folder, chat_template="alpaca"),
        load(folder, chat_template="jinja", chat_template_jinja=templates.built_in("alpaca").replace("Below", "Here")),
        load(folder, chat_template="chatml", tokens=["Hello there"]),
        load(folder, chat_template="chatml", eot_tokens=["</s>"]),
        load(byte_level(tmp_path / "c", bos="<s>", eos="</s>", adds_bos=True), chat_template="chatml"),
    ]
    assert len({tokenizer.fingerprint() for tokenizer in [chat, *others]}) == 6
    render(chat, CHAT)
    assert chat.fingerprint() == load(folder, chat_template="chatml").fingerprint()


def test_wrong_template_names(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, eos="</s>")
    tokenizer = load(folder).tokenizer
    with pytest.raises(UserError) as error:
        templates.choose(tokenizer, "chatlm", None)
    assert str(error.value) == (
        "unknown chat_template 'chatlm'; use chatml, llama3, gemma, mistral, alpaca, or the path of a .jinja file"
    )
    owner = load(folder).tokenizer
    owner.chat_template = "{{ messages }}"
    with pytest.raises(UserError, match=r"'qwen3'; use tokenizer_default \(this model has one\), chatml, llama3, "):
        templates.choose(owner, "qwen3", None)
    with pytest.raises(UserError, match=r"chat template none\.jinja does not exist; give a Jinja template or the path"):
        templates.choose(tokenizer, "jinja", "none.jinja")
    (tmp_path / "latin1.jinja").write_bytes(b"{{ '\xe9' }}")
    with pytest.raises(UserError, match=r"latin1\.jinja: the chat template is not UTF-8; save the file as UTF-8$"):
        templates.choose(tokenizer, str(tmp_path / "latin1.jinja"), None)
    with pytest.raises(UserError, match="has no chat template; set chat_template to one of chatml, llama3, gemma"):
        templates.choose(tokenizer, "tokenizer_default", None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content", "the chat template is not valid Jinja"),
        ("{{ raise_exception('no') }}", "the chat template refuses this chat: no"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses this chat: can only concatenate str"),
        ("{{ messages[0].content.index('z') }}", "the chat template refuses this chat: substring not found"),
        ("{{ 1 / 0 }}", "the chat template refuses this chat: division by zero"),
        ("{{ messages[-1].content }}", "the chat template does not write every turn exactly once"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
            r"after an answer the chat template writes '\n', which does not begin with a single token of this "
            "tokenizer: the model would not learn to stop; use a built-in chat_template",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}",
            "after an answer the chat template writes '<|end|>', which does not begin with a single token",
        ),
    ],
)
def test_unusable_templates(template: str, message: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path, eos="</s>")
    assert message in refusal(folder, chat_template="jinja", chat_template_jinja=template)


def test_today_is_always_the_same_day(tmp_path: Path) -> None:
    dated = (
        "{%- macro today() %}{{ strftime_now('%d %b %Y, %A %-d %B, %F %H:%M') }}{% endmacro %}"
        "{%- if strftime_now is defined %}{{- today() }}{% endif %}" + OWN
    )
    chat = load(byte_level(tmp_path, bos="<s>", eos="</s>"), chat_template=dated)
    document = render(chat, CHAT)
    text = chat.tokenizer.decode(document.tokens)
    assert text.startswith("26 Jul 2024, Friday 26 July, 2024-07-26 12:00<s>")
    assert datetime(2024, 7, 26, 12).strftime("%d %b %Y, %A %-d %B, %F %H:%M") == text.partition("<s>")[0]
    assert chat.chat_template == dated  # what is saved asks for the date


@pytest.mark.parametrize("start", ["", " a", "\n", "\n\n ", "  {% if true %}\n  b\n  {% endif %}\n", "{#- c -#}\n"])
def test_the_fixed_day_changes_no_other_text(start: str, tmp_path: Path) -> None:
    tokenizer = load(byte_level(tmp_path, eos="</s>"), chat_template="alpaca").tokenizer
    plain = templates.apply(tokenizer, start + "{{ 2024 }}", CHAT.messages)
    assert templates.apply(tokenizer, start + "{{ strftime_now('%Y') }}", CHAT.messages) == plain
    with pytest.raises(UserError, match=r"not valid Jinja: .* \(its line 2\)"):
        templates.apply(tokenizer, "{{ strftime_now('%Y') }}\n{% for }}", CHAT.messages)


def test_end_of_turn_added_by_the_config(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    options = {"chat_template": "jinja", "chat_template_jinja": template}
    chat = load(byte_level(tmp_path, eos="</s>"), tokens=["<|end|>"], **options)
    assert chat.eot_tokens == ("<|end|>",)
    assert trained(chat, render(chat, CHAT)) == [" Hello<|end|>", " Sure one<|end|>"]  # "assistant:" is the header


def test_errors_of_tokenizers(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(empty) == f"{empty} has no tokenizer; name one with tokenizer_config"
    slow = tmp_path / "slow"
    ByT5Tokenizer().save_pretrained(slow)
    assert refusal(slow).startswith(f"{slow} has only a slow tokenizer")
    assert refusal(byte_level(tmp_path / "a"), chat_template="alpaca") == (
        "chat_template alpaca ends answers with the eos_token, and this tokenizer has none; "
        "set special_tokens.eos_token"
    )
    assert refusal(byte_level(tmp_path / "b", eos="</s>"), eot_tokens=["<|eot|>"]) == (
        "eot_tokens: '<|eot|>' is not one token of this tokenizer; add it under `tokens` too"
    )


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_damaged_files(file: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path, eos="</s>")
    (folder / file).write_text('{"model_type": ')
    message = refusal(folder)
    assert message.startswith(f"the tokenizer in {folder} cannot be read (")
    assert message.endswith("download or save it again")


def test_tokenizer_beside_a_model_without_config(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    message = refusal(model, tokenizer_config=str(byte_level(tmp_path / "tokenizer", eos="</s>")))
    assert message.startswith(f"the model config in {model} cannot be read (ValueError: ")


def test_missing_tokenizer_file(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, eos="</s>")
    (folder / "tokenizer.json").unlink()
    assert refusal(folder).startswith(f"the tokenizer in {folder} cannot be read (ValueError: Couldn't instantiate")
