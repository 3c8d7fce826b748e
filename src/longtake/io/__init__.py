"""What enters and leaves longtake as files: checkpoints (``io.checkpoints``) and video (``io.video``)."""
