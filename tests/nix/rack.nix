# What a machine with three engines and one elsewhere writes.
{ pkgs, ... }:
{
  services.offloadd.enable = true; # the same options under the other name
  kernelcore.ml.offload = {
    modelsPath = "/srv/models";
    openFirewall = true;
    environmentFile = "/run/secrets/offloadd.env";
    credentials.ops = "/run/secrets/ops";
    checkConfig = false;
    settings = {
      server.listen = [ "127.0.0.1:9000" "[::]:9001" "unix:/run/offloadd/api.sock" ];
      server.insecure = true;
      budget.host.limit = "60%";
      models.chat = { aliases = [ "default" ]; run = "always"; context = 8192; };
      models.listen = { vram = "1GiB"; };
    };
    backends = {
      llamacpp = { package = pkgs.llama-cpp; args = [ "--flash-attn" "on" ]; models.chat = "chat.Q4_K_M.gguf"; };
      vllm = { package = pkgs.vllm; models.chat = "acme/chat"; };
      tgi.package = pkgs.text-generation-inference;
      whisper = {
        command = [ "whisper-server" "--port" "\${port}" "-m" "\${source}" ];
        models.listen = "ggml-base.bin";
        healthCheck = { path = "/ready"; readyStatus = 204; };
        inference = { endpoint = "/v1"; format = "openai"; };
      };
      mybackend = {
        name = "mybackend";
        models = [ "mymodel" ];
        healthCheck = "/health";
        inference = { endpoint = "http://127.0.0.1:7000/v1"; format = "openai"; };
      };
    };
  };
}
