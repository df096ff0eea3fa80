"""A placeholder backbone for the detectors of transformers that returns maps computed elsewhere.

``import odenets.detection.stand_in`` registers it. It has no weights: a detector that is built around it holds only the
head, and leaves the network's norms as they are.

Raises:
    ImportError: transformers is not installed.
"""

from typing import Any

from torch import Tensor

from schemes import SchemeError

try:
    from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.modeling_outputs import BackboneOutput
except ImportError as error:
    raise ImportError(f'DETR heads need transformers 5 ({error}): pip install "odenets[detect]"') from None


class MapsConfig(BackboneConfigMixin, PreTrainedConfig):
    """Widths of the maps.

    Args:
        channels: fine to coarse.
        kwargs: as in transformers' ``PreTrainedConfig``.
    """

    model_type = "odenets_maps"

    channels: list[int] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.channels = list(self.channels or [])
        # transformers also counts the stem as a stage; its map is not among the outputs.
        self.stage_names = ["stem", *(f"stage{n + 1}" for n in range(len(self.channels)))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=self.stage_names[1:]
        )
        super().__post_init__(**kwargs)


class HeldMaps(BackboneMixin, PreTrainedModel):  # type: ignore[misc]
    """Returns the maps in ``held``.

    Attributes:
        held: set before the detector is called, and emptied afterwards.
    """

    config_class = MapsConfig
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: MapsConfig):
        super().__init__(config)
        # One width per stage name, including the stem's.
        self.num_features = [0, *(config.channels or [])]
        self.held: tuple[Tensor, ...] = ()
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        """Returns the maps; the pictures are ignored.

        Args:
            pixel_values: the pictures.
            kwargs: further arguments that transformers passes.
        """
        if not self.held:
            raise SchemeError("a detector's head was called without maps\n  Call the Detector, not its head.")
        return BackboneOutput(feature_maps=self.held)  # type: ignore[arg-type]


# A detector looks up its backbone by the type of the configuration.
AutoConfig.register("odenets_maps", MapsConfig)
AutoBackbone.register(MapsConfig, HeldMaps)
