"""The command `evit presets`: the models of the paper by name, with parameters and operations."""

from ..settings import FlagParser
from .errors import command


@command("presets")
def main(argv: list[str]) -> None:
    """Print a table of all presets."""
    FlagParser(
        "presets",
        [],
        usage="evit presets",
        description="List the models of the paper that `evit train --preset` and `evit benchmark` take: image size, "
        "parameters, and GMACs of an image, dense and at the preset's keep rate.",
    ).parse(argv)
    import torch

    from evit_hf.presets import PRESETS, preset_config
    from evit_hf.profiling import num_macs

    from ..learning.models import random_classifier

    print(f"{'preset':<24}{'pixels':>8}{'M parameters':>14}{'dense GMACs':>13}{'keep rate':>11}{'GMACs':>8}")
    for name in PRESETS:
        config = preset_config(name)
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in random_classifier(config).parameters())
        print(
            f"{name:<24}{config.image_size:>8}{num_parameters / 1e6:>14.2f}{num_macs(config, 1.0) / 1e9:>13.2f}"
            f"{config.keep_rate:>11}{num_macs(config) / 1e9:>8.2f}"
        )
