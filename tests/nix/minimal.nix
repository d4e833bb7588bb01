{ ... }:
{
  kernelcore.ml.offload = {
    enable = true;
    settings.models.small.source = "small.gguf";
  };
}
