"""Fast paths chosen by structure and installed per instance: the causal head that runs where there is loss."""

from deltaw.fuse.head import install_loss_head, uninstall_loss_head

__all__ = ["install_loss_head", "uninstall_loss_head"]
