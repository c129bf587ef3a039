"""The command `evit` for launchers: `torchrun --nproc_per_node 8 -m evit_training train paper_finetune`."""

from .cli import main


main()
