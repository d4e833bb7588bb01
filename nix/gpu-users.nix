# Who may use the GPUs: the groups that own their device nodes.
{ config, lib, ... }:

let
  inherit (lib) mkEnableOption mkIf mkOption types;
  cfg = config.kernelcore.system.ml-gpu-users;
in
{
  options.kernelcore.system.ml-gpu-users = {
    enable = mkEnableOption "the use of GPUs by the named users";
    users = mkOption {
      type = types.listOf types.str;
      default = [ ];
      description = "Users that may open the GPUs.";
    };
    groups = mkOption {
      type = types.listOf types.str;
      default = [ "video" "render" ];
      description = "Groups that own the GPUs' device nodes.";
    };
  };

  config = mkIf cfg.enable {
    users.groups = lib.genAttrs cfg.groups (_: { members = cfg.users; });
  };
}
