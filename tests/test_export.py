"""`export_network`: one program for any token and clip counts, the logits of eager, from a file too."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rlt
from models import random_pack, tiny
from rlt.adapters import tiny as tiny_family
from rlt.errors import InvalidArgumentError
from rlt.export import export_network, export_patched, network_inputs
from rlt.structures import PackedTokens, TokenGrid


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def check(program: torch.export.ExportedProgram, model: rlt.VisionTransformer, packs: list[PackedTokens]) -> None:
    network = program.module()
    with torch.no_grad():
        for packed in packs:
            expected = model(packed)
            torch.testing.assert_close(network(*network_inputs(packed)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length_encoding", ["none", "learned"])
def test_other_token_counts_give_the_logits_of_eager(length_encoding: str) -> None:
    model = tiny(length_encoding=length_encoding)
    example, *packs = (random_pack(seed, num_clips=3) for seed in range(4))
    assert len({packed.num_tokens for packed in (example, *packs)}) == 4
    check(export_network(model, example), model, packs)


@pytest.mark.parametrize("num_clips", [1, 3])
def test_other_clip_counts_give_the_logits_of_eager(num_clips: int) -> None:
    model = tiny()
    program = export_network(model, random_pack(0, num_clips))
    check(
        program,
        model,
        [random_pack(seed, count, most) for seed, (count, most) in enumerate([(1, 60), (2, 2), (7, 64)])],
    )
    check(program, model, [random_pack(9, num_clips=1, most=2)])


def test_a_saved_program_gives_the_same_in_another_process(tmp_path: Path) -> None:
    model = tiny(length_encoding="learned")
    packed = random_pack(1, num_clips=4)
    torch.export.save(export_network(model, random_pack(0, num_clips=2)), tmp_path / "network.pt2")
    check(torch.export.load(tmp_path / "network.pt2"), model, [packed])
    torch.save(network_inputs(packed), tmp_path / "inputs.pt")
    code = (
        "import rlt.export, sys, torch; folder = sys.argv[1]; inputs = torch.load(f'{folder}/inputs.pt'); "
        "torch.save(torch.export.load(f'{folder}/network.pt2').module()(*inputs), f'{folder}/logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt").detach(), model(packed), atol=1e-5, rtol=1e-4)


def test_float_patches_half_precision_and_mixed_grids() -> None:
    model = tiny().bfloat16()
    packs = []
    for seed in range(2):
        plain = random_pack(seed, num_clips=2)
        patches = torch.randn(plain.num_tokens, 1536, generator=torch.Generator().manual_seed(seed))
        fields = (patches.bfloat16(), plain.coords, plain.lengths, plain.segments)
        packs.append(PackedTokens(*fields, (TokenGrid(4, 4, 4), TokenGrid(4, 4, 5))))
    network = export_network(model, packs[0]).module()
    with torch.no_grad():
        torch.testing.assert_close(network(*network_inputs(packs[1])), model(packs[1]), atol=2e-2, rtol=2e-2)


def test_the_model_stays_as_it_was() -> None:
    model, packed = tiny(), random_pack(0, num_clips=2)
    with torch.no_grad():
        before = model(packed)
        names = set(model.state_dict())
        program = export_network(model, packed)
        assert torch.equal(model(packed), before)
    assert set(model.state_dict()) == names
    assert {name.removeprefix("model.") for name in program.state_dict} >= names


def test_what_cannot_be_exported_is_told() -> None:
    model, packed = tiny(), random_pack(0, num_clips=2)
    with pytest.raises(InvalidArgumentError, match="training mode"):
        export_network(model.train(), packed)
    model.eval().merge_per_block = 2
    with pytest.raises(InvalidArgumentError, match="merge_per_block is 2, which no graph holds; set it to 0"):
        export_network(model, packed)
    model.merge_per_block = 0
    other = replace(packed, spec=rlt.PatchSpec(tubelet_size=4))
    with pytest.raises(InvalidArgumentError, match="tubelet_size=4"):
        export_network(model, other)


def classifier(name: str) -> Any:
    pytest.importorskip("transformers")
    size = tiny_family.Size(width=32, depth=2, heads=2, mlp_width=64, num_frames=4, image_size=32, patch_size=8)
    return tiny_family.build(name, size)


def half_still_clips(columns: int) -> torch.Tensor:
    """Two clips, float [2, 4, 3, 32, 32]; the first stands still in its left columns."""
    clips = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(columns))
    clips[0, 3, :, :, :columns] = clips[0, 0, :, :, :columns]
    return clips


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("run_lengths", ["ignored", "aware"])
@pytest.mark.parametrize("name", ["videomae", "vivit"])
def test_a_patched_classifier_chooses_tokens_in_the_graph(name: str, run_lengths: str, tmp_path: Path) -> None:
    model = classifier(name)
    rlt.patch(model, run_lengths=run_lengths)
    program = export_patched(model, half_still_clips(16))
    assert model.rlt.last is None
    torch.export.save(program, tmp_path / "classifier.pt2")
    network = torch.export.load(tmp_path / "classifier.pt2").module()
    counts = set()
    for columns in (0, 8, 24, 32):
        clips = half_still_clips(columns)
        with torch.no_grad():
            torch.testing.assert_close(network(clips), model(clips).logits, atol=1e-5, rtol=1e-4)
        counts.add(model.rlt.last.num_kept)
    assert len(counts) == 4


def test_patched_models_that_cannot_be_exported_are_told() -> None:
    model, clips = classifier("videomae"), half_still_clips(8)
    with pytest.raises(InvalidArgumentError, match="takes a patched VideoMAEForVideoClassification or"):
        export_patched(model, clips)
    rlt.patch(model, expand="fill")
    with pytest.raises(InvalidArgumentError, match="a threshold and expand=None"):
        export_patched(model, clips)
    with pytest.raises(InvalidArgumentError, match="training mode"):
        export_patched(model.train(), clips)
