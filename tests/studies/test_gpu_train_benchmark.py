import argparse
import json
import sys
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
    for name in ("gpu_train", "gpu_roofline", "gpu_profile"):
        sys.modules.pop(name)


# PEFT asks transformers by the old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_one_command_measures_every_row_and_says_why_one_is_missing(benchmark, tmp_path, monkeypatch, capsys):
    def here(name, args):
        # A process for each row takes seconds, and is tried by itself below.
        return benchmark.worker(name, args)

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
    parser = benchmark.arguments()

    def asked(name, *more):
        args = parser.parse_args([*TINY, "--model-folder", str(tmp_path / "model"), *more])
        args.given = [*TINY, *more]
        return benchmark.ask(name, args)

    assert set(asked("ceilings")) == {"gemm_tflops", "copy_tbps"}
    assert asked("frozen", "--limit", "0.2") == {"error": "not done after 0.2 s"}


def test_peers_that_read_a_folder_get_one_that_is_whole(benchmark, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(benchmark, "ask", lambda name, args: benchmark.worker(name, args))
    args = benchmark.arguments().parse_args([*TINY, "--model-folder", str(tmp_path / "model")])
    assert benchmark.provide_folder(args) is None
    saved = transformers.AutoModelForCausalLM.from_pretrained(args.model_folder)
    made = benchmark.random_model(args)
    assert len(transformers.AutoTokenizer.from_pretrained(args.model_folder)) == 512
    for (name, a), (other, b) in zip(saved.named_parameters(), made.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert benchmark.provide_folder(args) is None


def test_what_layers_keep_is_what_fused_layers_say(benchmark):
    from gpu_roofline import KEEPS, kept_bytes

    from deltaw.fuse import block

    assert [*KEEPS, "host"] == ["values", *block.KEEPS]
    for shape in benchmark.SHAPES.values():
        normed = shape.family == "qwen3"
        sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "itemsize": 2}
        for keep in list(KEEPS)[1:]:
            one = block.kept_bytes(keep, 100, width=shape.width, inner=shape.inner, head_norms=normed, **sizes)
            assert kept_bytes(shape, 100, keep) == shape.layers * one


def test_the_roofline_is_the_one_that_is_documented(benchmark):
    table = benchmark.roofline("llama-8b", 4, 2048, keep="all", base="bfloat16", tflops=750, tbps=3.0)
    assert table in (FOLDER.parent / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["tiny", "qwen3-8b"])
def test_the_roofline_counts_the_model_that_is_trained(benchmark, name):
    import transformers

    import deltaw as dw

    shape = benchmark.SHAPES[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape.config(64), dtype=torch.bfloat16)
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.layers * shape.layer_parameters == sum(m.weight.numel() for m in linears)
    norms = sum(p.numel() for key, p in model.named_parameters() if "q_norm" in key or "k_norm" in key)
    stored = sum(p.numel() for p in model.parameters()) - norms
    assert benchmark.weight_bytes(shape, "bfloat16") == 2 * stored
    if name == "tiny":
        dw.adapt(model.to_empty(device="cpu"), dw.LoRA(r=benchmark.RANK, target_modules=benchmark.TARGETS))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert shape.adapter_parameters == count


def test_the_roofline_counts_what_torch_counts(benchmark):
    from torch.utils.flop_counter import FlopCounterMode

    args = benchmark.arguments().parse_args([*TINY, "--batch", "1", "--length", "64"])
    from gpu_roofline import step_parts

    shape = benchmark.SHAPES["tiny"]
    model = benchmark.random_model(args).requires_grad_(False)
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
    for name in (*benchmark.OWN, *benchmark.PEERS):
        assert benchmark.system_name(name) == name
