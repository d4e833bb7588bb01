# Where models are kept: a folder that a group of people fills and the service reads.
{ config, lib, ... }:

let
  inherit (lib) mkEnableOption mkIf mkOption types;
  cfg = config.kernelcore.ml.models-storage;
in
{
  options.kernelcore.ml.models-storage = {
    enable = mkEnableOption "a folder for models, shared by a group";
    path = mkOption {
      type = types.path;
      default = "/var/lib/ml-models";
      description = "The folder.";
    };
    group = mkOption {
      type = types.str;
      default = "ml-models";
      description = "Its group: members may add and remove models.";
    };
    users = mkOption {
      type = types.listOf types.str;
      default = [ ];
      description = "Members of the group.";
    };
  };

  config = mkIf cfg.enable {
    users.groups.${cfg.group}.members = cfg.users;
    systemd.tmpfiles.rules = [ "d ${toString cfg.path} 2775 root ${cfg.group} -" ];
  };
}
