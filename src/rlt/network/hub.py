"""A model as a folder, and as a page of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelHubMixin
from torch import nn

from rlt import weights
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.network.card import Evaluation, card_text
from rlt.network.config import MODEL_TYPE, ViTConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class HubModel(
    nn.Module,
    ModelHubMixin,
    library_name="rlt",
    pipeline_tag="video-classification",
    tags=["run-length-tokenization"],
):
    """What a network inherits to be saved, loaded and published; it is made from a `ViTConfig` alone."""

    config: ViTConfig

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        config: None = None,
        evaluations: Sequence[Evaluation] = (),
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write model.safetensors, config.json with the labels, and a README.md, the model's card, where there is none.

        After a failure the folder's old files are still there and whole. `push_to_hub` uploads a model.

        Args:
            save_directory: made where it does not exist.
            config: not used; the model's own configuration is written.
            evaluations: for the card: the JSON files of `rlt evaluate`, such as dense and with RLT.
            model_card_kwargs: further arguments of `generate_model_card`.

        Raises:
            CheckpointError: if the folder holds another kind of model, or cannot be written.
            InvalidArgumentError: for evaluations that are none, or where the folder has a card already.
        """
        if config is not None:
            raise InvalidArgumentError("save_pretrained writes the model's own configuration; set model.config instead")
        folder, card = Path(save_directory), {}
        if not (folder / "README.md").exists():
            about = {"name": folder.resolve().name, "evaluations": evaluations, **(model_card_kwargs or {})}
            card["README.md"] = str(self.generate_model_card(**about))
        elif evaluations:
            raise InvalidArgumentError(
                f"{folder / 'README.md'} is there already; move it away, or leave evaluations out to keep it"
            )
        try:
            written_by = version("rlt")
        except PackageNotFoundError:  # run from a source tree
            written_by = "unknown"
        content = {"model_type": MODEL_TYPE, "rlt_version": written_by, **self.config.to_dict()}
        weights.write_folder(folder, self.state_dict(), content, card)

    def push_to_hub(self, repo_id: str, *, evaluations: Sequence[Evaluation] = (), **options: Any) -> str:
        """Upload weights, configuration and a card with the clips, the tokens and what `evaluations` measured.

        Args:
            repo_id: "owner/name" on the hub; made where it does not exist.
            evaluations: see `save_pretrained`.
            options: those of huggingface_hub's `push_to_hub`: private, token, branch, create_pr and so on.

        Returns:
            The address of the commit.
        """
        about = {"name": repo_id, "evaluations": evaluations, **(options.pop("model_card_kwargs", None) or {})}
        self.generate_model_card(**about)  # a mistake leaves no empty page behind
        return super().push_to_hub(repo_id, model_card_kwargs=about, **options)

    def generate_model_card(self, *, name: str, evaluations: Sequence[Evaluation] = ()) -> ModelCard:
        """The card of this model: its settings, what was measured, and lines that run.

        Args:
            name: what `from_pretrained` is called with.
            evaluations: see `save_pretrained`.

        Raises:
            InvalidArgumentError: for evaluations that are none.
        """
        metadata = self._hub_mixin_info.model_card_data
        return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{card_text(self.config, name, evaluations)}")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode and float32, from a folder or a hub id.

        Checkpoints of other projects are read by `rlt.create_model(name, checkpoint=...)`. The keyword arguments are
        those of huggingface_hub.

        Raises:
            CheckpointError: in one line, if there is nothing of ours, or any weight is missing or does not fit.
        """
        folder = weights.find_source(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        config = weights.read_config(folder)
        if config is None:
            raise CheckpointError(f"{folder} has no config.json; give a folder that save_pretrained wrote, or a hub id")
        model = cls(ViTConfig.from_dict(config, folder))
        weights.load_strictly(model, weights.read_folder(folder), folder)
        return model.eval()
