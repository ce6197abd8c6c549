"""Export of backbones to other tools, and import of published checkpoints."""
