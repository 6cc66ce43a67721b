"""Speed and memory of the ops of ``cfsp_kernels`` beside their rivals, measured in one run."""
