# The NixOS module: what is to be served, as options; the same under `kernelcore.ml.offload` and `services.offloadd`.
# Settings are rendered to JSON, the config's other spelling, and a change of them reloads the daemon: no model that it does not
# name is touched.
{ config, lib, pkgs, ... }:

let
  inherit (lib) mkDefault mkEnableOption mkIf mkOption types;

  cfg = config.kernelcore.ml.offload;
  storage = config.kernelcore.ml.models-storage;
  user = "ml-offload";
  configPath = "/etc/offloadd/offloadd.json";

  render = import ./render.nix { inherit lib; };
  unit = import ./unit.nix { inherit lib; };
  rendered = render cfg;
  jsonText = builtins.toJSON rendered;
  # Other users that engines run as.
  engineUsers = lib.unique (lib.filter (name: name != null) (map (backend: backend.user or null) (lib.attrValues (rendered.backends or { }))));
  changesUser = engineUsers != [ ];
  addresses = cfg.settings.server.listen or [ ];
  ports = lib.filter (port: port != null) (map render.openPort addresses);

  plain = pkgs.writeText "offloadd.json" jsonText;
  checked = pkgs.runCommand "offloadd.json" { } ''
    ${cfg.package}/bin/offloadd check ${plain}
    cp ${plain} $out
  '';
  configFile = if cfg.checkConfig then checked else plain;
in
{
  imports = [
    ./models-storage.nix
    ./gpu-users.nix
    (lib.mkAliasOptionModule [ "services" "offloadd" ] [ "kernelcore" "ml" "offload" ])
  ];

  options.kernelcore.ml.offload = {
    enable = mkEnableOption "offloadd, the daemon that owns this machine's LLM servers";

    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The offloadd package.";
    };

    dataDir = mkOption {
      type = types.path;
      default = "/var/lib/ml-offload";
      description = "The daemon's own data: its registry, its state, and the logs of the servers.";
    };

    modelsPath = mkOption {
      type = types.coercedTo types.path lib.singleton (types.listOf types.path);
      default = [ storage.path ];
      defaultText = lib.literalExpression "[ config.kernelcore.ml.models-storage.path ]";
      description = "Folders where a model's `source` is looked for, in this order.";
    };

    settings = mkOption {
      type = types.submodule { freeformType = types.attrsOf render.valueType; };
      default = { };
      example = lib.literalExpression ''
        {
          server.auth.keys = [ { name = "ops"; key = "''${file:/run/credentials/ml-offload-api.service/ops}"; scopes = [ "admin" ]; } ];
          budget.gpus.default = { limit = "95%"; reserve = "512MiB"; };
          models."llama3.2" = { source = "Llama-3.2-3B-Q4_K_M.gguf"; idle_timeout = "10m"; };
        }
      '';
      description = ''
        The config as `offloadd schema` describes it. Secrets are written as `''${file:/path}` or `''${env:NAME}`: what stands here
        itself is readable by everybody in the store.
      '';
    };

    backends = mkOption {
      type = types.attrsOf (types.submodule (import ./backend-options.nix));
      default = { };
      example = lib.literalExpression ''
        {
          llamacpp.package = pkgs.llama-cpp;
          vllm.package = pkgs.vllm;
          mybackend = {
            name = "mybackend";
            models = [ "mymodel" ];
            healthCheck = "/health";
            inference = { endpoint = "http://127.0.0.1:7000/v1"; format = "openai"; };
          };
        }
      '';
      description = ''
        Engines as data. With a `package` the program is taken from it; with an `inference.endpoint` that is a whole address the
        engine is one that runs elsewhere. What `settings.backends` says of an engine is added to it.
      '';
    };

    environmentFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/run/secrets/offloadd.env";
      description = "Variables for `\${env:NAME}` in the settings, and OFFLOADD_KEY for the reload where there are keys.";
    };

    credentials = mkOption {
      type = types.attrsOf types.path;
      default = { };
      example = { ops = "/run/secrets/offloadd-ops"; };
      description = "Secret files that only the service sees, under /run/credentials/ml-offload-api.service.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Open the ports that the settings listen on. An address beyond loopback needs keys.";
    };

    socketActivation = mkOption {
      type = types.bool;
      default = true;
      description = "Have systemd hold the listening sockets, so that no connection is refused while the daemon restarts.";
    };

    checkConfig = mkOption {
      type = types.bool;
      default = !(lib.hasInfix "\${" jsonText);
      defaultText = lib.literalMD "true, unless the settings refer to files or variables that a build cannot see";
      description = "Refuse to build a system whose settings `offloadd check` refuses.";
    };
  };

  config = mkIf cfg.enable {
    kernelcore.ml.models-storage = {
      enable = mkDefault true;
      users = [ user ];
    };
    kernelcore.system.ml-gpu-users = {
      enable = mkDefault true;
      users = [ user ] ++ engineUsers;
    };

    kernelcore.ml.offload.settings = {
      server.listen = mkDefault [ "127.0.0.1:9000" "unix:/run/offloadd/api.sock" ];
      storage.data_dir = mkDefault (toString cfg.dataDir);
      storage.models_path = mkDefault (map toString cfg.modelsPath);
    };

    assertions = [
      {
        assertion = lib.all (name: render.isName name) (lib.attrNames cfg.backends);
        message = "kernelcore.ml.offload.backends: names are lower case letters, digits, - and _, and begin with a letter.";
      }
      {
        assertion = lib.all (backend: backend.package == null || backend.command == null) (lib.attrValues cfg.backends);
        message = "kernelcore.ml.offload.backends: an engine has a package or a command, not both.";
      }
      {
        assertion = lib.all (backend: !render.external backend || lib.elem backend.inference.format [ null "openai" ])
          (lib.attrValues cfg.backends);
        message = "kernelcore.ml.offload.backends: an engine that runs elsewhere speaks OpenAI's dialect, or is described in settings.backends.";
      }
    ] ++ map
      (name: {
        assertion = config.users.users ? ${name};
        message = "kernelcore.ml.offload: there is no users.users.${name}, as which an engine is to run.";
      })
      engineUsers;

    users.users.${user} = {
      isSystemUser = true;
      group = user;
      home = toString cfg.dataDir;
      description = "offloadd";
    };
    users.groups.${user} = { };

    environment.systemPackages = [ cfg.package ];
    environment.etc."offloadd/offloadd.json".source = configFile;
    networking.firewall.allowedTCPPorts = mkIf cfg.openFirewall ports;

    systemd.services.ml-offload-api = unit.service {
      inherit user configPath;
      inherit (cfg) package dataDir environmentFile credentials;
      writable = [ (toString storage.path) ];
      inherit changesUser;
      control = lib.findFirst (address: lib.hasPrefix "unix:" address) null addresses;
    } // {
      # The file under /etc is swapped before the reload, and its path stays.
      reloadTriggers = [ configFile ];
      # A new program takes the old one's place while the servers run on.
      stopIfChanged = false;
    } // lib.optionalAttrs changesUser { path = [ pkgs.util-linux ]; };
    systemd.services.ml-offload-reap = unit.reap { inherit user changesUser; inherit (cfg) package dataDir; };
    systemd.sockets.ml-offload-api = mkIf cfg.socketActivation (unit.socket { inherit user addresses; });
  };
}
