"""Prefix tuning against plain models given a filled cache, against PEFT, and in all the ways a cache is used."""

import copy

import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.evaluate import generate_answers, label_log_likelihood, perplexity
from deltaw.fuse.head import install_loss_head, uninstall_loss_head
from deltaw.methods.host import parts_of

# What PEFT asks of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

N = 3
#: Decoders of many kinds, and encoders that attend to a cache (BERT's kind).
MODELS = [
    "llama", "llama-seq", "mistral", "qwen3", "gemma", "gemma3", "phi", "phi3", "starcoder2", "falcon", "gpt_neox",
    "bloom", "opt", "mpt", "gptj", "codegen", "gpt_bigcode", "gpt2", "bert-seq", "roberta-seq",
]  # fmt: skip


def adapted(name, dtype=torch.float64, *, n=N, adapter="default", seed=1, **options):
    model = tiny.tiny(name, dtype) if isinstance(name, str) else name
    dw.adapt(model, dw.PrefixTuning(n, **options), name=adapter, dtype=dtype)
    # Of the size of the text's own keys and values.
    return tiny.randomise(model, adapter, std=1.0, seed=seed)


def prefix_of(model, adapter="default"):
    """Keys and values (layers, 2, heads, n, head_dim), taken apart as PEFT does."""
    part = next(part for _, _, part in parts_of(model, adapter) if hasattr(part, "prompt_embeddings"))
    n = len(part.prompt_embeddings)
    blocks = part.prompt_embeddings.view(1, n, part.layers * 2, part.heads, part.head_dim)
    return blocks.permute(2, 0, 3, 1, 4).unflatten(0, (part.layers, 2)).squeeze(2)


def filled(model, batch, adapter="default"):
    """A cache with the prefix in it, as a plain model reads it."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix_of(model, adapter)):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
    return cache


def plainly(plain, model, given, *, n=N):
    """The plain model after the prefix: a mask and positions that begin `n` earlier."""
    mask = given["attention_mask"]
    given = given | {"attention_mask": torch.cat([torch.ones(len(mask), n, dtype=mask.dtype), mask], dim=1)}
    if "position_ids" in given:
        given["position_ids"] = given["position_ids"] + n
    return plain(**given, past_key_values=filled(model, len(mask))).logits


def padded(*, left=False, length=8):
    ids = torch.randint(3, tiny.VOCAB, (3, length), generator=generator(0, "padded"))
    mask = (torch.arange(length) < torch.tensor([length, length - 2, length - 5])[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def loss_of(logits):
    weights = torch.randn(logits.shape, generator=generator(0, "loss")).to(logits.dtype)
    return (torch.tanh(logits) * weights).sum()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_a_filled_cache(name, left):
    if left and name == "roberta-seq":
        pytest.skip("counts positions from the padding")
    given, model, plain = padded(left=left), adapted(name).train(), tiny.tiny(name, torch.float64).train()
    if left and name not in ("bloom", "opt", "mpt"):
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = plainly(plain, model, given)
    parameter = next(iter(dw.adapter_parameters(model, "default").values()))
    (theirs,) = torch.autograd.grad(loss_of(expected), [parameter])
    for use_cache in (False, True, None):
        more = {} if use_cache is None else {"use_cache": use_cache}
        out = model(**given, **more)
        (ours,) = torch.autograd.grad(loss_of(out.logits), [parameter])
        assert tiny.relative(out.logits, expected) < 1e-12
        assert tiny.relative(ours, theirs) < 1e-9 and ours.abs().sum(1).all()
        cache = out.get("past_key_values")
        assert cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 8)
    with torch.no_grad():
        assert tiny.relative(plain(**padded()).logits, model(**padded()).logits) > 0.05
    as_tuple = model(**given, return_dict=False, use_cache=False)
    assert torch.equal(as_tuple[0], model(**given, use_cache=False).logits)
    assert all(isinstance(item, torch.Tensor) for item in as_tuple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_base_and_adapter_are_independent(dtype, adapter_dtype):
    model = dw.adapt(tiny.tiny("llama", dtype), dw.PrefixTuning(N), dtype=adapter_dtype)
    tiny.randomise(model, std=1.0)
    (parameter,) = dw.adapter_parameters(model, "default").values()
    assert parameter.dtype == adapter_dtype
    got = model(**padded()).logits
    assert got.dtype == dtype
    loss_of(got).backward()
    assert parameter.grad.dtype == adapter_dtype and parameter.grad.isfinite().all() and parameter.grad.any()
    exact = adapted("llama")
    exact.load_state_dict(model.state_dict())
    expected = plainly(tiny.tiny("llama", dtype).double(), exact, padded())
    # bfloat16: some roundings of 4e-3 in each of two layers.
    assert tiny.relative(got, expected) < (1e-5 if dtype == torch.float32 else 5e-2)


def test_on_four_bits_it_is_what_it_is_on_their_values():
    from deltaw.quant import NF4, quantize_model, quantized_sites

    base = quantize_model(tiny.tiny("llama"), NF4(embeddings=True, head=True))
    plain = tiny.tiny("llama")
    for path, module, weight in quantized_sites(base):
        plain.get_submodule(path).weight = nn.Parameter(weight.dequantize().contiguous().view_as(module.weight))
    model = adapted(base, torch.float32)
    assert tiny.relative(model(**padded()).logits, plainly(plain, model, padded())) < 1e-5


# Caches.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "bloom"])
def test_a_cache_holds_the_text_alone_and_is_continued(name):
    model, ids = adapted(name), padded()["input_ids"][:1]
    whole = model(input_ids=ids, use_cache=False).logits
    cache = DynamicCache()
    pieces = []
    for piece in ids.split([3, 1, 4], dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        pieces.append(out.logits)
        assert out.past_key_values is cache
    assert cache.get_seq_length() == 8
    assert tiny.relative(torch.cat(pieces, dim=1), whole) < 1e-6
    cache.crop(-2)
    again = model(input_ids=ids[:, 6:], past_key_values=cache).logits
    assert tiny.relative(again, whole[:, 6:]) < 1e-6
    # The same cache under the bare base: nothing of the prefix is in it but what the text's states took from it.
    own = model(input_ids=ids).past_key_values
    assert [layer.keys.shape[-2] for layer in own.layers] == [8, 8]


@pytest.mark.parametrize("window", [4, 6, 20])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_sliding_windows_leave_the_prefix_behind(name, window):
    """Whole passes, continued passes and generation agree with the plain model and the filled cache."""

    def made():
        found = tiny.tiny(name, torch.float64)
        found.config.sliding_window = window
        for module in found.modules():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = window
        return found

    model, plain, given = adapted(made()), made(), padded()
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    expected = plainly(plain, model, given)
    assert tiny.relative(model(**given, use_cache=False).logits, expected) < 1e-6
    cache, pieces = DynamicCache(config=model.config), []
    assert any(layer.is_sliding for layer in cache.layers)
    for place, piece in enumerate(given["input_ids"].split([2, 1, 1, 3, 1], dim=1)):
        pieces.append(model(input_ids=piece, past_key_values=cache).logits)
        assert place or not cache.layers[0].keys.shape[-2] > 2
    assert tiny.relative(torch.cat(pieces, dim=1), expected) < 1e-6


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
def test_generation_is_the_plain_models_step_by_step(name, left):
    given, model, plain = padded(left=True), adapted(name), tiny.tiny(name, torch.float64)
    if not left:
        given = {key: value[:, 3:] for key, value in padded().items()}
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
        given["input_ids"] = given["input_ids"].clamp(min=3)
    new = 5
    settings = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = model.generate(**given, **settings)
    assert torch.equal(got, model.generate(**given, **settings, use_cache=False))
    ids, mask = given["input_ids"], given["attention_mask"]
    for _ in range(new):
        step = {"input_ids": ids, "attention_mask": mask}
        if name != "opt":
            step["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        following = plainly(plain, model, step)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], dim=1), torch.cat([mask, torch.ones_like(following)], dim=1)
    assert torch.equal(got, ids)
    beams = model.generate(**given, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**given, **settings, num_beams=3, use_cache=False))


def test_evaluation_with_its_own_caches():
    """Scores of labels from shared caches equal those of whole passes; perplexity and answers go through."""
    model = adapted("llama").requires_grad_(False)
    draw = generator(0, "prompts")
    common = torch.randint(3, tiny.VOCAB, (4,), generator=draw).tolist()
    prompts = [common + torch.randint(3, tiny.VOCAB, (n,), generator=draw).tolist() for n in (1, 5, 3, 5, 2)]
    labels = [[7], [8, 9, 10], [8, 11]]
    got = label_log_likelihood(model, prompts, labels, batch_size=3, pad_token_id=0, normalize=False)
    for i, prompt in enumerate(prompts):
        for j, label in enumerate(labels):
            ids = torch.tensor([prompt + label])
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = plainly(tiny.tiny("llama", torch.float64), model, given).log_softmax(-1)[0]
            own = logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(label)[:, None]).sum()
            assert abs(own.item() - got[i, j].item()) < 1e-4
    rows = [{"input_ids": prompt, "labels": prompt} for prompt in prompts]
    found = perplexity(model, rows, batch_size=2, pad_token_id=0)
    total = 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = plainly(tiny.tiny("llama", torch.float64), model, given)[0, :-1]
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    assert found["loss"] == pytest.approx(total / found["tokens"], rel=1e-5)


def test_answers_are_generated():
    import small_runs

    tokenizer = small_runs.byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(config)
    adapted(tiny.draw(model, 0, "answers") or model.double())
    got = generate_answers(model, tokenizer, ["aa", "bbbbb"], max_new_tokens=6)
    alone = [generate_answers(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in ("aa", "bbbbb")]
    assert got == alone


# Beside other things.


def test_the_loss_head_computes_after_the_prefix():
    model, given = adapted("llama"), padded()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)

    def step():
        model.zero_grad(set_to_none=True)
        out = model.train()(**given, labels=labels)
        out.loss.backward()
        (parameter,) = dw.adapter_parameters(model, "default").values()
        return out, parameter.grad

    own, expected = step()
    assert install_loss_head(model) is None
    fast, got = step()
    assert fast.logits is None and fast.get("past_key_values") is None
    torch.testing.assert_close(fast.loss.float(), own.loss.float())
    # transformers' own loss goes through float32.
    assert tiny.relative(got, expected) < 1e-5
    uninstall_loss_head(model)


def test_beside_lora_it_is_lora_after_the_prefix():
    model = adapted("llama", adapter="prefix")
    dw.adapt(model, dw.LoRA(r=4), name="lora", dtype=torch.float64)
    tiny.randomise(model, "lora")
    plain = dw.adapt(tiny.tiny("llama", torch.float64), dw.LoRA(r=4), name="lora", dtype=torch.float64)
    tiny.randomise(plain, "lora")
    dw.set_adapter(model, ["prefix", "lora"])
    mask = padded()["attention_mask"]
    given = padded() | {"attention_mask": torch.cat([torch.ones(3, N, dtype=torch.long), mask], dim=1)}
    expected = plain(**given, past_key_values=filled(model, 3, "prefix")).logits
    assert tiny.relative(model(**padded()).logits, expected) < 1e-6


def test_switching_and_deleting_leave_nothing():
    model, base = adapted("gpt2", adapter="one"), tiny.tiny("gpt2", torch.float64)
    adapted(model, n=5, adapter="two", seed=2)
    outputs = {}
    for active in ("one", "two", None):
        dw.set_adapter(model, active)
        outputs[active] = model(**padded()).logits
    assert torch.equal(outputs[None], base(**padded()).logits)
    assert not torch.equal(outputs["one"], outputs["two"])
    twin = copy.deepcopy(model)
    dw.unload(model)
    assert torch.equal(model(**padded()).logits, outputs[None]) and "forward" not in model.transformer.__dict__
    dw.set_adapter(twin, "two")
    assert torch.equal(twin(**padded()).logits, outputs["two"])


def test_starting_values():
    def start(seed, n=N):
        (parameter,) = dw.adapter_parameters(
            dw.adapt(tiny.tiny("llama").train(), dw.PrefixTuning(n), seed=seed), "default"
        ).values()
        return parameter.detach()

    state = torch.get_rng_state()
    first = start(0, 200)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, start(0, 200)) and not torch.equal(first, start(1, 200))
    assert first.shape == (200, 2 * 2 * 1 * 8)
    # 6400 draws: the deviation is within 4 of its own deviations.
    assert abs(float(first.std()) / 0.02 - 1) < 4 / (2 * 6400) ** 0.5
    model = dw.adapt(tiny.tiny("llama").train(), dw.PrefixTuning(N))
    assert all(module.training for module in model.modules())


def test_what_it_does_not_go_with_is_one_line():
    checkpointed = adapted("llama").train()
    enable = (
        getattr(checkpointed, "activation_checkpointing_enable", None) or checkpointed.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    several = adapted("llama", adapter="one")
    adapted(several, adapter="two")
    half = copy.deepcopy(several)
    dw.set_adapter(several, ["one", "two"])
    dw.set_adapter(half, {"one": 0.5})
    packed = {"input_ids": padded()["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 3)}
    model = adapted("llama")
    static = transformers.StaticCache(config=model.config, max_cache_len=20)
    for refused, says in [
        (lambda: adapted("t5"), "not for encoder-decoders, and T5ForConditionalGeneration"),
        (lambda: adapted("bart-seq"), "not for encoder-decoders, and BartForSequence"),
        (lambda: adapted("distilbert-seq"), "keeps no keys and values that a prefix could stand before"),
        (lambda: adapted("modernbert"), "keeps no keys and values"),
        (lambda: dw.adapt(nn.Linear(2, 2), dw.PrefixTuning()), "Linear is no transformers model"),
        (lambda: checkpointed(**padded()), "does not go with gradient_checkpointing"),
        (lambda: several(**padded()), "several prefixes are active at once"),
        (lambda: half(**padded()), "has weight 0.5, and its kind knows none but 1"),
        (lambda: model(**packed), "does not go with packed rows"),
        (
            lambda: model(**padded(), past_key_values=static),
            "needs a DynamicCache, and was given a Static",
        ),
        (lambda: model(**padded(length=62)), "62 tokens after a prefix of 3 are more than the 64 positions"),
        (lambda: model(input_ids=packed["input_ids"], attention_mask=torch.ones(3, 1, 8, 8)), "an attention mask"),
        (lambda: dw.merge(model), "depends on the input and cannot be merged"),
        (lambda: dw.PrefixTuning(0), "num_virtual_tokens is 0"),
    ]:
        with pytest.raises(InputError, match=says):
            refused()
    # A refused call leaves the model working.
    assert torch.equal(model(**padded()).logits, adapted("llama")(**padded()).logits)


# PEFT.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom", "llama-seq", "bert-seq"])
def test_logits_and_gradients_are_pefts(name):
    import peft

    given, model = padded(), adapted(name)
    task = "SEQ_CLS" if name.endswith("-seq") else "CAUSAL_LM"
    theirs = peft.get_peft_model(
        tiny.tiny(name, torch.float64), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N)
    )
    (parameter,) = dw.adapter_parameters(model, "default").values()
    encoder = theirs.prompt_encoder["default"].double()
    assert encoder.embedding.weight.shape == parameter.shape
    encoder.embedding.weight.data.copy_(parameter)
    got, expected = model(**given).logits, theirs(**given).logits
    assert tiny.relative(got, expected) < 1e-6
    loss_of(got).backward()
    loss_of(expected).backward()
    assert tiny.relative(parameter.grad, encoder.embedding.weight.grad) < 1e-6
