"""`VisionTransformer.compile_network`: one graph for any token counts, the outputs and gradients of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models import random_pack, tiny
from rlt.errors import InvalidArgumentError
from rlt.network import vit


class CountingBackend:
    """Runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("length_encoding", ["none", "learned"])
def test_fifty_token_counts_need_one_graph(length_encoding: str) -> None:
    model, counting = tiny(length_encoding=length_encoding), CountingBackend()
    packs = [random_pack(seed, num_clips=2 + seed % 5) for seed in range(50)]
    assert len({packed.num_tokens for packed in packs}) > 35
    with torch.no_grad():
        eager = [model(packed) for packed in packs]
        model.compile_network(backend=counting)
        for packed, expected in zip(packs, eager, strict=True):
            torch.testing.assert_close(model(packed), expected, atol=1e-5, rtol=1e-4)
    assert counting.graphs <= 2


def test_one_clip_and_clips_of_one_token_are_right() -> None:
    model = tiny()
    packs = [random_pack(seed, num_clips, most) for seed, (num_clips, most) in enumerate([(1, 2), (3, 2), (1, 60)])]
    with torch.no_grad():
        eager = [model(packed) for packed in packs]
        model.compile_network(backend="eager")
        for packed, expected in zip(packs, eager, strict=True):
            torch.testing.assert_close(model(packed), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps_give_the_gradients_of_eager(checkpointing: bool) -> None:
    gradients = []
    for compiled in (False, True):
        model = tiny().train()
        model.activation_checkpointing = checkpointing
        if compiled:
            model.compile_network(backend="aot_eager")
        for seed in range(4):
            model(random_pack(seed, num_clips=3)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-3)


def test_training_does_not_recompile_over_token_counts() -> None:
    model, counting = tiny().train(), CountingBackend()
    model.set_drop_path(0.2)
    model.compile_network(backend=counting)
    for seed in range(20):
        model(random_pack(seed, num_clips=3)).sum().backward()
    assert counting.graphs <= 2


def test_the_default_compiler_gives_the_same_logits_and_gradients() -> None:
    packs = [random_pack(seed, num_clips=3) for seed in range(3)]
    found = []
    for compiled in (False, True):
        model = tiny(depth=1)  # two graphs are generated, for inference and for training
        if compiled:
            model.compile_network()
        try:
            with torch.no_grad():
                logits = [model(packed) for packed in packs]
            model.train()
            for packed in packs:
                model(packed).square().sum().backward()
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"no C++ compiler that works: {error}")
        found.append((logits, {name: parameter.grad for name, parameter in model.named_parameters()}))
    for ours, expected in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_features_run_through_the_same_graph_in_the_same_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit, "_TOKENS_AT_ONCE_ON_CPU", 80)
    model, packed, counting = tiny(), random_pack(0, num_clips=9), CountingBackend()
    assert len(packed.chunks(80)) > 2
    runs: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: runs.append(len(inputs[0])))
    with torch.no_grad():
        logits, pieces = model(packed), runs.copy()
        torch.testing.assert_close(model.head(model.forward_features(packed)), logits)
        assert runs == 2 * pieces
        model.forward_tokens(packed)
        assert runs == 3 * pieces
        model = tiny()
        model.compile_network(backend=counting)
        torch.testing.assert_close(model(packed), logits, atol=1e-5, rtol=1e-4)
        graphs = counting.graphs
        torch.testing.assert_close(model.head(model.forward_features(packed)), logits, atol=1e-5, rtol=1e-4)
    assert counting.graphs == graphs > 0


def test_a_compiled_network_merges_no_tokens() -> None:
    model, packed = tiny(), random_pack(0, num_clips=2)
    model.merge_per_block = 3
    model.compile_network(backend="eager")
    with pytest.raises(InvalidArgumentError, match="merge_per_block is 3, but the network is compiled; set it to 0"):
        model(packed)
    model.merge_per_block = 0
    torch.testing.assert_close(model(packed), tiny()(packed), atol=1e-5, rtol=1e-4)


def test_weights_keep_their_names() -> None:
    model = tiny()
    names = set(model.state_dict())
    model.compile_network(backend="eager")
    model(random_pack(0, num_clips=2))
    assert set(model.state_dict()) == names
