import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--shape", "tiny", "--device", "cpu", "--batch", "2", "--length", "16", "--steps", "2", "--warmup", "1"]
ROWS = ["qlora@8GB", "lora-fp8-general", "peft-lora", "unsloth-lora", "peft-qlora"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_train

    yield gpu_train
    for name in ("gpu_train", "gpu_rows", "gpu_roofline", "gpu_profile"):
        sys.modules.pop(name)


def asked(benchmark, folder, name, *more):
    """What a row's own process, or processes, have to say."""
    args = benchmark.arguments().parse_args([*TINY, "--model-folder", str(folder / "model"), *more])
    args.given = [*TINY, *more]
    return benchmark.ask(name, args)


# PEFT asks transformers by the old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_one_command_measures_every_row_and_says_why_one_is_missing(benchmark, tmp_path, monkeypatch, capsys):
    from gpu_rows import worker

    def here(name, args):
        # A process for each row takes seconds, and is tried by itself below.
        return worker(name, args)

    def absent(name):
        return None if name == "unsloth" else installed(name)

    out = tmp_path / "rows.json"
    installed = benchmark.importlib.util.find_spec
    monkeypatch.setattr(benchmark, "ask", here)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", absent)
    monkeypatch.setattr(benchmark.shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    benchmark.main([*TINY, "--profile", "--out", str(out), "--systems", *ROWS])
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ROWS
    assert rows["unsloth-lora"] == {"name": "unsloth-lora", "error": "unsloth not installed"}
    assert "0.0 GB free" in rows["peft-qlora"]["error"]
    assert "fp8 is for fused layers" in rows["lora-fp8-general"]["error"]
    for name in ("qlora@8GB", "peft-lora"):
        row = rows[name]
        assert "error" not in row
        assert len(row["steps_s"]) == 2
        assert min(row["steps_s"]) <= row["step_s"] <= max(row["steps_s"])
        assert row["tokens_per_s"] == pytest.approx(32 / row["step_s"])
        # Random weights know nothing of random tokens: normal logits cost half a nat over the uniform guess.
        assert row["loss"] == pytest.approx(torch.tensor(512.0).log().item() + 0.5, rel=0.05)
        assert row["peak_allocated_bytes"] > 1e8
        assert 0 < row["of_gemm_ceiling"] < 1
        assert row["profile"]["groups"]["GEMM"] > 0
        assert sum(row["profile"]["groups"].values()) + row["profile"]["gaps"] == pytest.approx(1, abs=0.2)
        assert f"\n| {name} | {row['tokens_per_s']:,.0f} |" in printed
        assert f"{name}: share of the time" in printed
    assert rows["qlora@8GB"]["notes"] == ["no budget on a CPU"]
    assert any("2 of 2 layers fused" in line for line in rows["qlora@8GB"]["said"])
    assert {"deltaw", "torch", "transformers", "peft"} <= set(record["versions"])


def test_a_row_has_a_process_and_a_time_limit(benchmark, tmp_path):
    assert set(asked(benchmark, tmp_path, "ceilings")) == {"gemm_tflops", "copy_tbps"}
    assert asked(benchmark, tmp_path, "frozen", "--limit", "0.2") == {"error": "not done after 0.2 s"}


def test_rows_on_two_processes_are_those_of_one_on_twice_the_rows(benchmark, tmp_path):
    from gpu_rows import worker

    names = ("lora-ddp2@max", "qlora-fsdp2x2")
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: asked(benchmark, tmp_path, name), names))
    for name, row in zip(names, found, strict=True):
        assert "error" not in row
        assert row["tokens_per_s"] == pytest.approx(2 * 32 / row["step_s"])
        assert row["peak_allocated_bytes"] > 1e8
        assert row["said"] == ["2 of 2 layers fused"]
        one = benchmark.arguments().parse_args([*TINY, "--batch", "4"])
        # In bfloat16, and the mean of two processes' means.
        assert row["loss"] == pytest.approx(worker(benchmark.on_one_gpu(name), one)["loss"], rel=2e-4)


def test_a_row_ends_with_the_first_of_its_processes_that_fails(benchmark, tmp_path, monkeypatch):
    # The second process has no folder to write to; the first would wait for it.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, tempfile\n"
        "def refuse(*args, **kwargs):\n"
        "    raise OSError('no room')\n"
        "if os.environ.get('RANK') == '1':\n"
        "    tempfile.TemporaryDirectory = refuse\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert asked(benchmark, tmp_path, "lora-ddp2") == {"error": "OSError: no room"}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_no_process_outlives_its_row(benchmark, tmp_path, monkeypatch):
    def running():
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found.append(file.read_text())
            except OSError:
                continue
        return [line for line in found if str(tmp_path) in line and "torch.distributed.run" not in line]

    class Impatient(subprocess.Popen):
        def communicate(self, input=None, timeout=None):
            if timeout == 77:
                until = time.monotonic() + 60
                while len(running()) < 2 and time.monotonic() < until:
                    time.sleep(0.05)
                seen.extend(running())
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().communicate(input, timeout)

    seen: list[str] = []
    monkeypatch.setattr(benchmark.subprocess, "Popen", Impatient)
    assert asked(benchmark, tmp_path, "lora-ddp2", "--limit", "77") == {"error": "not done after 77 s"}
    assert len(seen) == 2
    assert running() == []


def test_rows_on_several_gpus_stand_beside_those_on_one(benchmark, tmp_path, monkeypatch, capsys):
    def said(name, args):
        if name == "ceilings":
            return {"gemm_tflops": 700.0, "copy_tbps": 3.0, "gpu": "a card"}
        speed = {1: 1000.0, 2: 1930.0}[benchmark.gpus_of(name)]
        return {"tokens_per_s": speed, "step_s": 0.5, "steps_s": [0.5], "notes": [], "said": []}

    monkeypatch.setattr(benchmark, "ask", said)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    out = tmp_path / "rows.json"
    benchmark.main(["--gpus", "2", "--model-folder", str(tmp_path), "--out", str(out)])
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    kinds = [f"{method}{kind}@max" for method in ("lora", "qlora") for kind in ("", "-ddp2", "-fsdp2x2")]
    assert list(rows) == kinds
    for name, row in rows.items():
        alone = f"{name.split('-')[0].removesuffix('@max')}@max"
        assert row["notes"] == ([] if name == alone else [f"x 1.93 of {alone}"])
        assert row.get("times_one_gpu") == (None if name == alone else 1.93)
    # A step takes N times the work on N cards: what one of them reaches is the same.
    assert len({row["of_gemm_ceiling"] for row in rows.values()}) == 1
    capsys.readouterr()
    benchmark.main(["--systems", "lora-fsdp2x3@8GB", "lora-ddp2", "--model-folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| lora-fsdp2x3@8GB | | | | | | needs 3 GPUs, and there are 2 |" in printed
    assert "| lora-ddp2 | 1,930 |" in printed


def test_more_than_one_gpu_is_two_or_more(benchmark, capsys):
    for name in ("lora-ddp1", "lora-fsdp2", "lora-ddp02", "lora-ddp2-fsdp2x2", "peft-lora-ddp2", "lora-fp8-ddp2"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no row"):
            benchmark.system_name(name)
    for words in (["--gpus", "1"], ["--gpus", "2", "--systems", "lora"]):
        with pytest.raises(SystemExit):
            benchmark.main(words)
    assert benchmark.gpus_of("qdora-fsdp2x16-fp8-most-gc@8GB") == 16
    assert benchmark.on_one_gpu("qdora-fsdp2x16-fp8-most-gc@8GB") == "qdora-fp8-most-gc@8GB"
    assert benchmark.gpus_of("peft-lora") == 1


def test_peers_that_read_a_folder_get_one_that_is_whole(benchmark, tmp_path, monkeypatch):
    import transformers
    from gpu_rows import random_model, worker

    monkeypatch.setattr(benchmark, "ask", worker)
    args = benchmark.arguments().parse_args([*TINY, "--model-folder", str(tmp_path / "model")])
    assert benchmark.provide_folder(args) is None
    saved = transformers.AutoModelForCausalLM.from_pretrained(args.model_folder)
    made = random_model(args)
    assert len(transformers.AutoTokenizer.from_pretrained(args.model_folder)) == 512
    for (name, a), (other, b) in zip(saved.named_parameters(), made.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert benchmark.provide_folder(args) is None


def test_what_layers_keep_is_what_fused_layers_say(benchmark):
    from gpu_roofline import KEEPS, kept_bytes

    from deltaw.fuse import keep as keeps

    assert [*KEEPS] == [keep for keep in keeps.KEEPS if not keep.startswith("host")]
    for shape in benchmark.SHAPES.values():
        normed = shape.family == "qwen3"
        sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "itemsize": 2}
        for keep in KEEPS:
            one = keeps.kept_bytes(keep, 100, width=shape.width, inner=shape.inner, head_norms=normed, **sizes)
            assert kept_bytes(shape, 100, keep) == shape.layers * one


def test_the_roofline_is_the_one_that_is_documented(benchmark):
    table = benchmark.roofline("llama-8b", 4, 2048, keep="all", base="bfloat16", tflops=750, tbps=3.0)
    assert table in (FOLDER.parent / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["tiny", "qwen3-8b"])
def test_the_roofline_counts_the_model_that_is_trained(benchmark, name):
    import transformers
    from gpu_roofline import sharded_bytes
    from gpu_rows import TARGETS

    import deltaw as dw

    shape = benchmark.SHAPES[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape.config(64), dtype=torch.bfloat16)
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.layers * shape.layer_parameters == sum(m.weight.numel() for m in linears)
    norms = sum(p.numel() for key, p in model.named_parameters() if "q_norm" in key or "k_norm" in key)
    stored = sum(p.numel() for p in model.parameters()) - norms
    assert benchmark.weight_bytes(shape, "bfloat16") == 2 * stored
    parts = sharded_bytes(shape, "bfloat16", 4)
    beside = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel() + model.model.norm.weight.numel()
    assert parts["embedding and head, gathered"] == 2 * beside
    assert parts["its part of the base"] == stored / 2
    if name == "tiny":
        dw.adapt(model.to_empty(device="cpu"), dw.LoRA(r=benchmark.RANK, target_modules=TARGETS))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert shape.adapter_parameters == count
        assert parts["its part of adapter, gradients and AdamW"] == 4 * count
        layer = sum(p.nbytes for p in model.model.layers[0].parameters())
        assert parts["layers, gathered"] == 3 * layer


def test_the_roofline_counts_what_torch_counts(benchmark):
    from torch.utils.flop_counter import FlopCounterMode

    args = benchmark.arguments().parse_args([*TINY, "--batch", "1", "--length", "64"])
    from gpu_roofline import step_parts
    from gpu_rows import random_model

    shape = benchmark.SHAPES["tiny"]
    model = random_model(args).requires_grad_(False)
    model.enable_input_require_grads()
    model.config._attn_implementation = "eager"
    ids = torch.randint(4, 512, (1, 64), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    parts = {part.name: part.flops for part in step_parts(shape, 1, 64, keep="all", base="bfloat16")}
    frozen = parts["frozen GEMMs, forward"] + parts["frozen GEMMs, input gradient"] + parts["head's GEMMs"]
    # Eager attention computes the whole square, by two products forward and four backward; fused kernels half of it,
    # and one product again. The rotary embedding's outer product is counted too.
    whole = frozen + parts["attention"] * 2 * 6 / 7
    assert counter.get_total_flops() == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention"),
        (
            "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<c10::BFloat16>>",
            "elementwise",
        ),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "optimizer"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantise"),
        ("_dequantize_words_kernel", "dequantise"),
        ("_rotate_kernel", "elementwise"),
        ("_project_kernel", "low-rank"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void something_else<int>", "other"),
    ],
)
def test_kernels_are_grouped_by_their_names(benchmark, kernel, group):
    from gpu_profile import group_of

    assert group_of(kernel) == group


def test_unknown_rows_are_refused_by_name(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.arguments().parse_args(["--systems", "qlora@8GB", "qlora-fp9"])
    assert "'qlora-fp9' is no row" in capsys.readouterr().err
    several = [name.format(2) for name in benchmark.ON_SEVERAL]
    for name in (*benchmark.OWN, *several, *benchmark.PEERS):
        assert benchmark.system_name(name) == name
