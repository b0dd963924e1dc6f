"""The command line: which flags there are, how they are spelled, what a mistake looks like."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lape
from lape.cli import app as cli
from lape.errors import LapeError
from lape.look.options import DrawOptions
from lape.options import PredictOptions
from lape.recipe import OF_THE_ORIGINAL, Recipe
from lape.study.options import DemoOptions

ROOT = Path(__file__).parents[2]

# Frozen: a flag that is added, renamed or dropped has to be changed here, too.
TRAIN_FLAGS = """
--recipe
--model --join-type --pe --input-size --in-chans --drop --drop-path --model-kwargs
--model-ema --no-model-ema --model-ema-decay --model-ema-force-cpu --no-model-ema-force-cpu
--model-ema-warmup --no-model-ema-warmup --grad-checkpointing --no-grad-checkpointing --compile --no-compile
--skip-corrupt --no-skip-corrupt --global-batch --max-skipped --save-steps --save-minutes --best-by --log-to
--data-on-device --no-data-on-device --ema --no-ema --deterministic --no-deterministic --dist-timeout
--data-path --data-set --inat-category --num-workers --pin-mem --no-pin-mem --decode --eval-crop-ratio --mean --std
--columns
--epochs --batch-size --seed --start-epoch --bce-loss --no-bce-loss --smoothing --train-mode --no-train-mode
--finetune --warm-start --no-warm-start --attn-only --no-attn-only --as-original
--opt --opt-eps --opt-betas --momentum --weight-decay --clip-grad --lr --unscale-lr --no-unscale-lr
--sched --warmup-epochs --warmup-lr --min-lr --decay-epochs --decay-rate --dr --cooldown-epochs --patience-epochs
--schedule-epochs --lr-noise --lr-noise-pct --lr-noise-std
--color-jitter --aa --scale --train-interpolation --repeated-aug --no-repeated-aug
--three-augment --ThreeAugment --no-three-augment --no-ThreeAugment --src --no-src
--reprob --remode --recount --resplit --no-resplit
--mixup --cutmix --cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode --mixup-off-epoch
--distillation-type --teacher-model --teacher-path --distillation-alpha --distillation-tau
--output-dir --resume --eval --no-eval --dist-eval --no-dist-eval --device --amp --threads --log-every
--world-size --dist-url --local-rank --distributed --cosub
--attention --pe-norm --pe-std --pe-lr-scale --rope-jitter
"""
EVAL_FLAGS = """
--checkpoint --resume
--model --join-type --pe --in-chans --model-kwargs --input-size --eval-crop-ratio --mean --std
--data-path --data-set --columns --inat-category --batch-size --num-workers --pin-mem --no-pin-mem --decode
--ema --no-ema --dist-eval --no-dist-eval --device --amp --attention --threads
--sizes --corruptions --severities --shuffle-patches --shift --occlude --json --plot
"""
# Fields that the original has not.
OURS = {
    *("eval_crop_ratio", "in_chans", "mean", "std", "model_kwargs", "amp", "threads", "log_every", "model_ema_warmup"),
    *("grad_checkpointing", "compile", "skip_corrupt", "global_batch", "max_skipped", "save_steps", "save_minutes"),
    *("best_by", "log_to", "ema", "deterministic", "dist_timeout", "warm_start", "data_on_device", "decode", "columns"),
    *("scale", "mixup_off_epoch", "schedule_epochs", "as_original", "attention"),
    *("pe_std", "pe_norm", "pe_lr_scale", "rope_jitter"),
}
COMMANDS = set("bench check-data compare demo train eval export hosts predict probe visualize".split())
COMMANDS |= {"recipes", "version", "completion"}

# Every flag of the original's main.py in its own spelling, with a value that is not its default.
SPELLINGS = """
--batch-size 8 | batch_size=8
--epochs 2 | epochs=2
--bce-loss | bce_loss=True
--unscale-lr | unscale_lr=True
--model deit_tiny_patch16_224 | model='deit_tiny_patch16_224'
--pe 2D_sin | pe='2D_sin'
--join-type LaPE | join_type='LaPE'
--input-size 64 | input_size=64
--drop 0.1 | drop=0.1
--drop-path 0.2 | drop_path=0.2
--model-ema | model_ema=True
--no-model-ema | model_ema=False
--model-ema-decay 0.9 | model_ema_decay=0.9
--model-ema-force-cpu | model_ema_force_cpu=True
--opt sgd | opt='sgd'
--opt-eps 1e-6 | opt_eps=1e-6
--opt-betas 0.9 0.95 | opt_betas=(0.9, 0.95)
--clip-grad 1 | clip_grad=1.0
--momentum 0.8 | momentum=0.8
--weight-decay 0.1 | weight_decay=0.1
--sched step | sched='step'
--lr 1e-3 | lr=1e-3
--lr-noise 0.4 0.9 | lr_noise=(0.4, 0.9)
--lr-noise-pct 0.5 | lr_noise_pct=0.5
--lr-noise-std 0.5 | lr_noise_std=0.5
--warmup-lr 1e-5 | warmup_lr=1e-5
--min-lr 1e-6 | min_lr=1e-6
--decay-epochs 2.5 | decay_epochs=2.5
--warmup-epochs 1 | warmup_epochs=1
--cooldown-epochs 1 | cooldown_epochs=1
--patience-epochs 1 | patience_epochs=1
--decay-rate 0.5 | decay_rate=0.5
--dr 0.5 | decay_rate=0.5
--color-jitter 0.4 | color_jitter=0.4
--aa v0 | aa='v0'
--smoothing 0 | smoothing=0.0
--train-interpolation random | train_interpolation='random'
--repeated-aug | repeated_aug=True
--no-repeated-aug | repeated_aug=False
--train-mode | train_mode=True
--no-train-mode | train_mode=False
--ThreeAugment | three_augment=True
--ThreeAugment --src | three_augment=True, src=True
--reprob 0 | reprob=0.0
--remode const | remode='const'
--recount 2 | recount=2
--mixup 0 | mixup=0.0
--cutmix 0 | cutmix=0.0
--cutmix-minmax 0.2 0.8 | cutmix_minmax=(0.2, 0.8)
--mixup-prob 0.5 | mixup_prob=0.5
--mixup-switch-prob 0.1 | mixup_switch_prob=0.1
--mixup-mode elem | mixup_mode='elem'
--teacher-model resnet18 | teacher_model='resnet18'
--teacher-path t.pth | teacher_path='t.pth'
--distillation-type hard --teacher-path t.pth | distillation_type='hard', teacher_path='t.pth'
--distillation-alpha 0.1 | distillation_alpha=0.1
--distillation-tau 3 | distillation_tau=3.0
--finetune f.pth | finetune='f.pth'
--attn-only | attn_only=True
--data-path some/data_set | data_path='some/data_set'
--data-set CIFAR | data_set='CIFAR'
--inat-category genus | inat_category='genus'
--output_dir some/out_put | output_dir='some/out_put'
--device cpu | device='cpu'
--seed 3 | seed=3
--resume c.pth | resume='c.pth'
--start_epoch 3 | start_epoch=3
--dist-eval | dist_eval=True
--num_workers 0 | num_workers=0
--pin-mem | pin_mem=True
--no-pin-mem | pin_mem=False
--world_size 1 | world_size=1
--dist_url env:// | dist_url='env://'
--eval-crop-ratio 0.875 | eval_crop_ratio=0.875
"""
LINES = [tuple(line.split(" | ")) for line in SPELLINGS.strip().splitlines()]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """What `lape.train.loop.train` was called with; nothing is trained."""
    import lape.train.loop

    recipes: list[Recipe] = []
    monkeypatch.setattr(lape.train.loop, "train", recipes.append)
    return recipes


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """What `lape.train.evaluate.evaluate_checkpoint` was called with; nothing is evaluated."""
    import lape.train.evaluate

    recipes: list[Recipe] = []
    monkeypatch.setattr(lape.train.evaluate, "evaluate_checkpoint", recipes.append)
    return recipes


def refusal(capsys: pytest.CaptureFixture[str], *tokens: str, app: Any = cli.app) -> str:
    assert cli.run(app, tokens) == cli.USER_ERROR
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.err.endswith("\n")
    return shown.err


def shell(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- which flags there are --------------------------------------------------------------------------------------------


def flags_of(app: Any) -> set[str]:
    arguments = app.assemble_argument_collection(default_parameter=cli.app.default_parameter)
    return {name for argument in arguments for name in argument.names if name.startswith("--")}


def test_flags_are_frozen() -> None:
    assert flags_of(cli.app["train"]) == set(TRAIN_FLAGS.split())
    assert flags_of(cli.original) == set(TRAIN_FLAGS.split())
    assert flags_of(cli.app["eval"]) == set(EVAL_FLAGS.split())


def test_commands_are_frozen() -> None:
    assert {name for name in cli.app if not name.startswith("-")} == COMMANDS


def test_versions_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(cli.app, ["-V"]) == 0
    assert capsys.readouterr().out == f"{lape.__version__}\n"
    assert cli.run(cli.app, ["version"]) == 0
    first, python, torch = capsys.readouterr().out.splitlines()[:3]
    assert first == f"lape {lape.__version__}"
    assert python.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}.")
    assert torch.startswith("torch ")


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_flags(shell_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(cli.app, ["completion", shell_name]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in (*COMMANDS, "join-type", "save-dir"))
    if shell_name == "bash" and shutil.which("bash"):
        script += '\nCOMP_WORDS=(lape train --join); COMP_CWORD=2; _lape; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == "--join-type\n"


def test_the_help_leaves_out_what_is_always_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(cli.app, ["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--recipe" in shown
    assert not [flag for flag in ("--cosub", "--resplit") if flag in shown]


def test_defaults_are_the_recipes() -> None:
    flags = {
        argument.field_info.name: argument.field_info.default
        for argument in cli.app["train"].assemble_argument_collection()
        if argument.field_info.name in Recipe.model_fields
    }
    assert flags == {name: field.default for name, field in Recipe.model_fields.items()}


# --- how they are spelled ---------------------------------------------------------------------------------------------


def test_every_field_of_the_original_is_tried() -> None:
    ours = OURS - {"eval_crop_ratio"}
    tried = {part.split("=")[0].strip() for _, wanted in LINES for part in wanted.split(", ") if "=" in part}
    assert tried == (set(Recipe.model_fields) - ours - {"eval"}) | (set(OF_THE_ORIGINAL) - {"resplit"})


@pytest.mark.matrix
@pytest.mark.parametrize(("flags", "wanted"), LINES, ids=[flags for flags, _ in LINES])
def test_flags_of_the_original(flags: str, wanted: str, trained: list[Recipe]) -> None:
    expected = eval(f"dict({wanted})")
    for command, spell in (
        (cli.original, str),
        (cli.app, lambda token: token.replace("-", "_").replace("__", "--", 1) if token.startswith("--") else token),
    ):
        tokens = [spell(token) for token in flags.split()]
        assert cli.run(command, [*(["train"] if command is cli.app else []), *tokens]) == 0
        assert trained[-1] == Recipe(**expected)
        itself = {"warmup_epochs"} if command is cli.original else set()  # is not shortened there
        assert trained[-1].model_fields_set == (set(expected) - set(OF_THE_ORIGINAL)) | itself


def test_only_the_name_of_a_flag_is_respelled(trained: list[Recipe]) -> None:
    assert cli.run(cli.original, ["--output_dir=a_b/c-d", "--model", "vit_tiny_patch16_224"]) == 0
    assert (trained[0].output_dir, trained[0].model) == ("a_b/c-d", "vit_tiny_patch16_224")
    assert cli._dashes(["--a_b=c_d", "--", "--e_f"]) == ["--a-b=c_d", "--", "--e_f"]  # behind --, names of files


def test_the_last_of_two_wins_as_in_argparse(trained: list[Recipe]) -> None:
    assert cli.run(cli.original, ["--lr", "1", "--no-pin-mem", "--lr", "2", "--pin-mem"]) == 0
    assert (trained[0].lr, trained[0].pin_mem) == (2.0, True)


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (["embed_dim=64", "class-token=false"], {"embed_dim": 64, "class_token": False}),
        (["global_pool=avg", "init_values=None", "x=[1, 2]"], {"global_pool": "avg", "init_values": None, "x": [1, 2]}),
        (['{"embed_dim": 64, "more": {"x": [1, true]}}'], {"embed_dim": 64, "more": {"x": [1, True]}}),
    ],
)
def test_model_kwargs(tokens: list[str], wanted: dict[str, Any], trained: list[Recipe]) -> None:
    assert cli.run(cli.app, ["train", "--model-kwargs", *tokens, "--lr", "1"]) == 0
    assert trained[0].model_kwargs == wanted


@pytest.mark.parametrize("token", ["64", "{embed_dim: 64}", "=64"])
def test_bad_model_kwargs(token: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "train", "--model-kwargs", token)
    assert "--model-kwargs" in message
    assert repr(token) in message


def test_a_recipe_and_overrides(trained: list[Recipe]) -> None:
    assert cli.run(cli.app, ["train", "--recipe", "digits", "--lr", "2e-3", "--join-type", "lape"]) == 0
    assert trained[0] == Recipe.from_yaml("digits", lr=2e-3, join_type="LaPE")
    assert trained[0].input_size == 8


def test_clip_grad_of_a_recipe_can_be_taken_back(trained: list[Recipe], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("clip_grad: 1.0\nbce_loss: true\n")
    assert (
        cli.run(cli.app, ["train", "--recipe", str(tmp_path / "r.yaml"), "--clip-grad", "none", "--no-bce-loss"]) == 0
    )
    assert (trained[0].clip_grad, trained[0].bce_loss) == (None, False)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_the_originals_eval_evaluates(trained: list[Recipe], evaluated: list[Recipe]) -> None:
    assert cli.run(cli.original, ["--eval", "--resume", "c.pth", "--join-type", "LaPE"]) == 0
    assert trained == []
    assert evaluated == [Recipe(eval=True, resume="c.pth", join_type="LaPE")]


@pytest.mark.parametrize("tokens", [["c.pth"], ["--resume", "c.pth"], ["--resume=c.pth"]])
def test_eval_leaves_to_the_checkpoint_what_is_not_given(tokens: list[str], evaluated: list[Recipe]) -> None:
    assert cli.run(cli.app, ["eval", *tokens, "--data_path", "d"]) == 0
    assert evaluated[0].model_fields_set == {"eval", "resume", "data_path"}
    assert evaluated[0].resume == "c.pth"


def test_eval_wants_one_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert "CHECKPOINT" in refusal(capsys, "eval")
    assert "CHECKPOINT" in refusal(capsys, "eval", "a.pth", "--resume", "b.pth")


def test_eval_refuses_what_only_training_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--mixup" in refusal(capsys, "eval", "a.pth", "--mixup", "0")


# --- the launcher -----------------------------------------------------------------------------------------------------


def test_local_rank_is_accepted_and_changes_nothing(trained: list[Recipe]) -> None:
    assert cli.run(cli.original, ["--local-rank=1"]) == cli.run(cli.original, ["--local_rank", "0"]) == 0
    assert trained == [Recipe(), Recipe()]


def test_distributed_wants_a_launcher(
    trained: list[Recipe], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "torchrun" in refusal(capsys, "--distributed", app=cli.original)
    assert "torchrun" in refusal(capsys, "--world_size", "2", app=cli.original)
    assert trained == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for tokens in (["--distributed", "--world_size", "2"], ["--distributed"], ["--world_size", "1"]):
        assert cli.run(cli.original, tokens) == 0
    assert "nproc_per_node=3" in refusal(capsys, "--world_size", "3", app=cli.original)
    assert len(trained) == 3


@pytest.mark.parametrize(
    ("tokens", "fix"),
    [
        (["--cosub"], "leave it out"),
        (["--resplit"], "leave it out"),
        (["--dist_url", "tcp://host:1"], "torchrun"),
        (["--src"], "--three-augment"),
    ],
)
def test_a_flag_that_cannot_do_what_it_does_there_is_refused(
    tokens: list[str], fix: str, trained: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fix in refusal(capsys, *tokens, app=cli.original)
    assert trained == []


def test_only_the_first_process_prints(
    monkeypatch: pytest.MonkeyPatch, evaluated: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    import lape.train.evaluate

    monkeypatch.setattr(lape.train.evaluate, "evaluate_checkpoint", lambda recipe: print("* Acc@1"))
    for rank, shown in (("0", "* Acc@1\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert cli.run(cli.app, ["eval", "c.pth"]) == 0
        assert capsys.readouterr().out == shown


def test_an_error_of_a_later_process_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert "[rank 3]" in refusal(capsys, "train", "--lr", "fast")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--batch-sise", "3"], ["--batch-sise", "--batch-size"]),
        (["train", "--jointype", "LaPE"], ["--jointype", "--join-type"]),
        (["train", "--zzzzzz"], ["--zzzzzz", "--help"]),
        (["train", "surplus"], ["surplus", "--help"]),
        (["train", "--lr", "fast"], ["--lr", "fast", "float"]),
        (["train", "--lr"], ["--lr", "argument", "give --lr 0.0005 (learning rate"]),
        (["train", "--epochs", "ten"], ["--epochs", "ten", "int", "give --epochs 300 (epochs to train)"]),
        (["train", "--mean", "1", "b"], ["--mean", "give --mean MEAN (channel means"]),
        (["train", "--pin-mem=maybe"], ["maybe", "give --pin-mem or --no-pin-mem, without a value"]),
        (["export", "c.pth"], ["--output-dir", "give --output-dir OUTPUT_DIR (gets folder/"]),
        (["check-data"], ["give --data-path DATA_PATH (folder with train/"]),
        (["--nosuch"], ["--nosuch", "--help"]),
        (["train", "--mixup-mode", "half"], ["half", "batch", "pair", "elem"]),
        (["train", "--batch-size", "0"], ["batch_size=0", "greater than 0"]),
        (["train", "--join-type", "LaPE-shared"], ["LaPE-shared", "LaPE-sharing", "unshare"]),
        (["train", "--pe", "3D_sin"], ["3D_sin", "2D_RPE"]),
        (["train", "--opt-betas", "0.9"], ["opt_betas", "2 are needed"]),
        (["train", "--recipe", "absent.yaml"], ["absent.yaml", "lape recipes"]),
        (["predict", "--checkpoint", "c.pth"], ["IMAGE"]),
        (["predict", "a.png"], ["--checkpoint"]),
        (["check-data", "x" * 300], ["File name too long"]),
        (["eval", "c.pth", "--pe-std", "1"], ["--pe-std", "lape eval takes it from there: leave it out"]),
        (["eval", "c.pth", "--pe-norm=none"], ["--pe-norm", "lape eval takes it from there: leave it out"]),
        (["eval", "c.pth", "--no-warm-start"], ["--no-warm-start", "a checkpoint says of itself"]),
        (["eval", "c.pth", "--lr", "1"], ["--lr is of training", "lape eval trains nothing: leave it out"]),
        (["predict", "a.png", "--checkpoint", "c", "--input-size", "8"], ["lape predict takes it from there"]),
        (["visualize", "c.pth", "--html", "h", "--epochs", "1"], ["--epochs is of training"]),
        (["probe", "c.pth", "--pe-std", "1"], ["lape probe takes it from there"]),
        (["predict", "a.png", "--resume", "c"], ["Unknown option: --resume", "--help"]),
        (["predict", "a.png", "--checkpoint", "c.pth", "--top-k", "0"], ["top_k='0'", "greater than or equal to 1"]),
        (["visualize"], ["CHECKPOINT"]),
        (["visualize", "c.pth"], ["--save-dir", "--html"]),
        (["visualize", "c.pth", "--save-dir", "d", "--image", "a.png"], ["--html"]),
        (["visualize", "c.pth", "--html", "f.html", "--token", "1"], ["--token", "--save-dir"]),
        (["visualize", "absent.pth", "--html", "f.html"], ["no such checkpoint", "absent.pth"]),
        (["visualize", "c.pth", "--html", "absent/f.html"], ["no folder", "absent"]),
        (["visualize", "c.pth", "--save-dir", "d", "--size", "1", "2", "3", "4"], ["--size 1 2 3 4"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(tokens: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, *tokens)
    assert all(part in message for part in parts), message


def test_errors_of_the_work_are_one_line_and_bugs_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lape.train.loop

    def fail(error: BaseException) -> Any:
        def run(recipe: Recipe) -> None:
            raise error

        return run

    monkeypatch.setattr(lape.train.loop, "train", fail(LapeError("no data in 'd':\n give another")))
    assert refusal(capsys, "train") == "error: no data in 'd': give another\n"
    monkeypatch.setattr(lape.train.loop, "train", fail(KeyboardInterrupt()))
    assert cli.run(cli.app, ["train"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setattr(lape.train.loop, "train", fail(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.run(cli.app, ["train"])


# --- the other commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    import lape.train.evaluate

    calls: list[Any] = []

    def classify(images: Any, options: PredictOptions, problems: list[str]) -> list[lape.train.evaluate.Prediction]:
        calls.append((list(images), options))
        return [lape.train.evaluate.Prediction(path, ["cat, tabby", "dog"], [0.75, 0.25]) for path in images]

    monkeypatch.setattr(lape.train.evaluate, "predictions", classify)
    return calls


def test_predict_prints(predictions: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(cli.app, ["predict", "a_1.png", "b.png", "--checkpoint", "c.pth", "--top_k", "2"]) == 0
    assert predictions == [(["a_1.png", "b.png"], PredictOptions(checkpoint="c.pth", top_k=2, device="auto"))]
    assert capsys.readouterr().out.splitlines()[:3] == ["a_1.png", "   75.00 %  cat, tabby", "   25.00 %  dog"]


def test_predict_writes(predictions: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = tmp_path / "p.json", tmp_path / "p.csv"
    command = ["predict", "a.png", "--checkpoint", "c.pth"]
    assert cli.run(cli.app, [*command, "--json", str(files[0]), "--csv", str(files[1])]) == 0
    assert json.loads(files[0].read_text())[1] == {"image": "a.png", "rank": 2, "class": "dog", "probability": 0.25}
    assert files[1].read_text().splitlines()[:2] == ["image,rank,class,probability", 'a.png,1,"cat, tabby",0.75']
    capsys.readouterr()
    assert cli.run(cli.app, [*command, "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_predict_names_a_file_that_cannot_be_written(
    predictions: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = str(tmp_path / "absent" / "p.json")
    assert target in refusal(capsys, "predict", "a.png", "--checkpoint", "c.pth", "--json", target)


def test_visualize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import lape.look.figures

    calls: list[tuple[str, str, DrawOptions]] = []

    def draw(source: str, save_dir: str, options: DrawOptions) -> list[Path]:
        calls.append((source, save_dir, options))
        return [Path("d/m/PE_token_sim.jpg"), Path("d/m/overview.png")]

    monkeypatch.setattr(lape.look.figures, "visualize", draw)
    assert cli.run(cli.app, ["visualize", "c.pth", "--save-dir", "d", "--token", "5", "--size", "64"]) == 0
    assert cli.run(cli.app, ["visualize", "c.pth", "--save_dir", "d", "--size", "64", "32", "--ema"]) == 0
    assert calls == [
        ("c.pth", "d", DrawOptions(token=5, size=(64,))),
        ("c.pth", "d", DrawOptions(size=(64, 32), ema=True)),
    ]
    assert [options.sides for _, _, options in calls] == [64, (64, 32)]
    assert "2 files in d/m" in capsys.readouterr().out


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    import lape.study.compare

    calls: list[DemoOptions] = []
    monkeypatch.setattr(lape.study.compare, "demo", calls.append)
    assert cli.run(cli.app, ["demo"]) == 0
    assert cli.run(cli.app, ["demo", "--output_dir", "o", "--seeds", "2", "--epochs", "3", "--long-seeds", "0"]) == 0
    assert calls == [DemoOptions(), DemoOptions(output_dir="o", seeds=2, epochs=3, long_seeds=0)]


def test_hosts_lists_every_host(capsys: pytest.CaptureFixture[str]) -> None:
    from lape.host import hosts

    assert cli.run(cli.app, ["hosts"]) == 0
    shown = capsys.readouterr().out
    for host in hosts():
        assert host.name in shown
        assert all(name.rpartition(".")[2] in shown for name in host.block_classes)
        assert all(version in " ".join(shown.split()) for version in host.tested)
    assert max(map(len, shown.splitlines())) <= 110


def test_hosts_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    from lape.host import hosts

    assert cli.run(cli.app, ["hosts", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["refused"]) for row in rows] == [(host.name, host.refused) for host in hosts()]


# --- as processes -----------------------------------------------------------------------------------------------------

HELP_WITHOUT_TORCH = """
import sys, time
start = time.process_time()  # what other processes take does not count
from lape.cli.app import app, run
code = run(app, sys.argv[1:])
heavy = sorted({"torch", "timm", "torchvision", "matplotlib", "numpy", "PIL"} & set(sys.modules))
print(f"{code} {heavy} {time.process_time() - start}", file=sys.stderr)
"""


@pytest.mark.parametrize("tokens", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_help_answers_at_once_and_without_torch(tokens: list[str]) -> None:
    done = shell("-c", HELP_WITHOUT_TORCH, *tokens)
    assert done.stderr.startswith("0 [] "), done.stderr
    assert float(done.stderr.split()[-1]) < 2.0
    assert done.stdout.strip()


def test_help_fits_80_columns_and_lists_by_topic() -> None:
    shown = shell("-m", "lape", "train", "--help", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 80
    places = [shown.index(f"─ {topic} ─") for topic in ("Recipe", "Model", "Data", "Training", "Schedule", "Run")]
    assert places == sorted(places)
    assert "accepted and ignored" in shown


def test_main_py_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "main.py").write_text((ROOT / "main.py").read_text())
    # -S keeps the installed package out of sight; the dependencies are named one by one.
    packages = {str(Path(inspect.getfile(__import__(name))).parents[1]) for name in ("cyclopts", "pydantic", "yaml")}
    for path in packages:
        for entry in Path(path).iterdir():
            if "lape" not in entry.name.lower() and not (tmp_path / "deps" / entry.name).exists():
                (tmp_path / "deps").mkdir(exist_ok=True)
                (tmp_path / "deps" / entry.name).symlink_to(entry)
    done = shell("-S", str(tmp_path / "main.py"), "--join-type", "nothing", PYTHONPATH=str(tmp_path / "deps"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "unknown join 'nothing'" in done.stderr


def test_python_dash_m_lape_exits_with_2_and_one_line() -> None:
    done = shell("-m", "lape", "train", "--batch-sise", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Unknown option: --batch-sise. Did you mean --batch-size?\n"


@pytest.mark.slow
def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    command = f"{sys.executable} -m lape hosts | head -n 1"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 where all fitted into the pipe before the reader left
