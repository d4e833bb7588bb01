# One engine of `kernelcore.ml.offload.backends`.
{ name, lib, ... }:

let
  inherit (lib) mkOption types;
  render = import ./render.nix { inherit lib; };
in
{
  freeformType = types.attrsOf render.valueType;

  options = {
    name = mkOption {
      type = types.str;
      default = name;
      description = "What the config calls the engine.";
    };
    package = mkOption {
      type = types.nullOr types.package;
      default = null;
      description = "Where its program comes from.";
    };
    command = mkOption {
      type = types.nullOr (types.listOf types.str);
      default = null;
      description = "Program and leading arguments, where no package gives them. A custom engine's may hold `\${port}`, `\${source}` and `\${model}`.";
    };
    models = mkOption {
      type = types.coercedTo (types.listOf types.str) (names: lib.genAttrs names (model: model)) (types.attrsOf types.str);
      default = { };
      description = "Models that it serves: their names, or names with what the engine calls them. `settings.models` adds to each.";
    };
    healthCheck = mkOption {
      type = types.nullOr (types.coercedTo types.str (path: { inherit path; }) (types.submodule {
        options = {
          path = mkOption {
            type = types.str;
            description = "Path of an HTTP GET.";
          };
          readyStatus = mkOption {
            type = types.int;
            default = 200;
            description = "The status that means ready.";
          };
        };
      }));
      default = null;
      description = "How a custom engine is asked whether it is ready.";
    };
    inference = {
      endpoint = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "http://127.0.0.1:7000/v1";
        description = "A path on the server that we start, or the whole address of one that runs elsewhere.";
      };
      format = mkOption {
        type = types.nullOr (types.either (types.enum [ "openai" ]) (types.attrsOf types.anything));
        default = null;
        description = "OpenAI's dialect where nothing is said; else where things stand in JSON of its own, as in the config.";
      };
    };
  };
}
