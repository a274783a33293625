"""What the documents say about Intel Neural Compressor is complete; figures and pictures come out again."""

import dataclasses
import re
from pathlib import Path

import pytest
from examples import why_bigger

import pared
from bench import front
from pared.fitting.config import INC_EQUIVALENTS

DOCS = Path(__file__).parent.parent / "docs"
COMING = (DOCS / "coming-from-inc.md").read_text(encoding="utf-8")
WHY = (DOCS / "why-is-my-model-bigger.md").read_text(encoding="utf-8")

# The parameters of INC 2.6, by the heading under which the document has a row for each.
INC = {
    "quantization.fit": "model conf calib_dataloader calib_func eval_func eval_dataloader eval_metric",
    "PostTrainingQuantConfig": "device backend domain recipes quant_format inputs outputs approach "
    "calibration_sampling_size op_type_dict op_name_dict reduce_range example_inputs excluded_precisions quant_level "
    "accuracy_criterion tuning_criterion diagnosis ni_workload_name",
    "AccuracyCriterion": "higher_is_better criterion tolerable_loss",
    "TuningCriterion": "strategy strategy_kwargs timeout max_trials objective",
    "In op_type_dict and op_name_dict": "weight activation dtype bits group_size scheme granularity algorithm",
    "recipes": "smooth_quant smooth_quant_args layer_wise_quant layer_wise_quant_args rtn_args awq_args gptq_args "
    "teq_args autoround_args fast_bias_correction weight_correction gemm_to_matmul graph_optimization_level "
    "first_conv_or_matmul_quantization last_conv_or_matmul_quantization pre_post_process_quantization "
    "add_qdq_pair_to_weight optypes_to_exclude_output_quant dedicated_qdq_pair",
    "Weight-only quantization": "bits group_size scheme algorithm enable_full_range enable_mse_search return_int "
    "group_dim actorder percdamp nsamples pad_max_length use_max_length block_size static_groups true_sequential "
    "lm_head enable_auto_scale folding export_compressed_model()",
    "Saving, loading, looking": "q_model.save(dir) best_configure history.snapshot q_model.fp32_model q_model.model "
    "Torch2ONNXConfig set_workspace set_resume_from set_random_seed set_tensorboard",
    "Other tools of INC 2.x": "MixedPrecisionConfig mix_precision.fit QuantizationAwareTrainingConfig "
    "prepare_compression WeightPruningConfig DistillationConfig KnowledgeDistillationLossConfig "
    "IntermediateLayersKnowledgeDistillationLossConfig SelfKnowledgeDistillationLossConfig HPOConfig NASConfig "
    "BenchmarkConfig benchmark.fit neural_coder neural_insights neural_solution",
}


def rows(heading: str) -> dict[str, str]:
    """Each of INC's words under a heading, and what is said of it."""
    section = COMING.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            words, said = line.strip("| ").split(" | ")
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", words), said)
    return found


@pytest.mark.parametrize("heading", INC)
def test_every_option_of_inc_has_a_row(heading: str) -> None:
    assert set(INC[heading].split()) - set(rows(heading)) == set()


def test_every_option_that_is_refused_has_a_row_and_every_option_with_a_row_is_known() -> None:
    said = rows("PostTrainingQuantConfig") | rows("TuningCriterion")
    ours = {field.name for field in dataclasses.fields(pared.PostTrainingQuantConfig)}
    assert set(INC_EQUIVALENTS) - set(said) == set()
    assert set(said) - set(INC_EQUIVALENTS) - ours == set()
    assert {option for option, words in said.items() if words.startswith("the same")} <= ours


def table(title: str) -> list[list[str]]:
    section = WHY.split(f"### {title}\n\n")[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]


@pytest.mark.slow
def test_the_table_of_the_small_network_is_what_the_example_prints(tmp_path: Path) -> None:
    shown = why_bigger.table(why_bigger.measure(why_bigger.linear(), tmp_path))
    assert shown in WHY


@pytest.mark.slow
def test_the_causes_in_the_large_model_are_those_in_the_table(tmp_path: Path) -> None:
    title = next(iter(why_bigger.MODELS))
    paths = why_bigger.write(why_bigger.MODELS[title](), tmp_path)
    for (name, path), (file, megabytes, _, causes, after) in zip(paths.items(), table(title)[1:], strict=True):
        ledger = pared.inspect(path)
        assert file == why_bigger.FILES[name][0]
        assert float(megabytes) == pytest.approx(ledger.nbytes / 1e6, rel=0.001)
        assert causes == why_bigger.causes(ledger.findings)
        if after.replace(".", "").isdecimal() and ledger.findings:
            assert ledger.findings[0].bytes_after == pytest.approx(float(after) * 1e6, rel=0.03)


def test_the_pictures_show_what_the_page_of_results_says() -> None:
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    for name, drawn in front.pictures(results).items():
        assert (DOCS / name).read_text(encoding="utf-8") == drawn, "run `python -m bench.front`"
    panels = {panel.model: panel for panel in front.panels(results)}
    assert set(panels) >= {*front.FRONT, "CREPE full", "textgenrnn"}
    assert {point.peer for point in panels["MiniLM"].points} >= {"pared", "openvino-int8", "ort-static"}


def test_every_source_file_that_a_document_names_exists() -> None:
    root = DOCS.parent
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("src/**/*.md")]
    named = {
        (page.name, path)
        for page in pages
        for path in re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text(encoding="utf-8"))
    }
    files = [
        path.as_posix()
        for folder in ("src", "tests", "bench", "examples", "docs")
        for path in (root / folder).rglob("*.py")
    ]
    assert len(named) > 40
    assert [(page, path) for page, path in sorted(named) if not any(file.endswith(f"/{path}") for file in files)] == []
