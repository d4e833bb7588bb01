# The units, as systemd/ has them for other systems: a test holds the two to each other. NixOS has a systemd that knows notify-reload.
{ lib }:

let
  inStateDir = dataDir: lib.hasPrefix "/var/lib/" (toString dataDir);
  state = dataDir:
    if inStateDir dataDir then {
      StateDirectory = lib.removePrefix "/var/lib/" (toString dataDir);
      StateDirectoryMode = "0750";
    } else { };

  runtime = {
    RuntimeDirectory = "offloadd";
    RuntimeDirectoryMode = "0755";
    RuntimeDirectoryPreserve = true;
  };

  hardening = {
    CapabilityBoundingSet = "";
    NoNewPrivileges = true;
    ProtectSystem = "strict";
    ProtectHome = "read-only";
    PrivateTmp = true;
    ProtectClock = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    RestrictNamespaces = true;
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    LockPersonality = true;
    SystemCallArchitectures = "native";
    SystemCallFilter = [ "@system-service" ];
    DevicePolicy = "closed";
    UMask = "0077";
  };

  # For engines of other users; systemd/drop-ins/engine-users.conf says what it costs.
  capabilities = changesUser: lib.optionalAttrs changesUser (lib.genAttrs [ "CapabilityBoundingSet" "AmbientCapabilities" ]
    (_: "CAP_SETUID CAP_SETGID CAP_KILL CAP_SYS_PTRACE CAP_DAC_READ_SEARCH"));

  # The reasons for each are in systemd/ml-offload-api.service.
  devices = map (name: "char-${name} rw")
    [ "nvidia" "nvidiactl" "nvidia-frontend" "nvidia-uvm" "nvidia-caps" "nvidia-modeset" "kfd" "drm" "accel" ];
in
{
  service = { package, user, configPath, dataDir, environmentFile, credentials, writable, control, changesUser }: {
    description = "offloadd, owner of this machine's LLM servers";
    wantedBy = [ "multi-user.target" ];
    after = [ "network.target" "remote-fs.target" "nvidia-persistenced.service" ];
    onFailure = [ "ml-offload-reap.service" ];
    startLimitIntervalSec = 300;
    startLimitBurst = 10;
    environment = { XDG_CACHE_HOME = "%C/ml-offload"; }
      // lib.optionalAttrs (control != null) { OFFLOADD_SERVER = control; };
    serviceConfig = hardening // state dataDir // runtime // {
      Type = "notify-reload";
      NotifyAccess = "main";
      ExecStart = "${package}/bin/offloadd run -c ${configPath}";
      ExecReload = "${package}/bin/offloadctl reload --wait";
      ExecStopPost = "${package}/bin/offloadd reap ${toString dataDir}";
      Restart = "always";
      RestartSec = "250ms";
      RestartSteps = 8;
      RestartMaxDelaySec = "1min";
      TimeoutStartSec = "2min";
      TimeoutStopSec = "2min";
      WatchdogSec = 30;
      KillMode = "process";
      FileDescriptorStoreMax = 256;
      OOMPolicy = "continue";
      Delegate = true;
      DelegateSubgroup = "main";
      User = user;
      Group = user;
      CacheDirectory = "ml-offload";
      CacheDirectoryMode = "0750";
      ReadWritePaths = map (path: "-${path}") (writable ++ lib.optional (!inStateDir dataDir) (toString dataDir));
      LimitNOFILE = 65536;
      LimitCORE = 0;
      LimitMEMLOCK = "infinity";
      TasksMax = "infinity";
      AmbientCapabilities = "";
      PrivateMounts = true;
      RemoveIPC = false;
      KeyringMode = "private";
      PrivateDevices = false;
      DeviceAllow = devices;
      ProtectProc = "invisible";
      RestrictAddressFamilies = [ "AF_UNIX" "AF_INET" "AF_INET6" "AF_NETLINK" ];
      SystemCallErrorNumber = "EPERM";
    } // capabilities changesUser
      // lib.optionalAttrs (environmentFile != null) { EnvironmentFile = environmentFile; }
      // lib.optionalAttrs (credentials != { }) { LoadCredential = lib.mapAttrsToList (name: path: "${name}:${path}") credentials; };
  };

  reap = { package, user, dataDir, changesUser }: {
    description = "End what a failed offloadd has left running";
    serviceConfig = hardening // state dataDir // runtime // {
      Type = "oneshot";
      ExecStart = "${package}/bin/offloadd reap ${toString dataDir}";
      User = user;
      Group = user;
      PrivateNetwork = true;
      RestrictAddressFamilies = [ "AF_UNIX" ];
    } // capabilities changesUser;
  };

  socket = { user, addresses }: {
    description = "offloadd's API";
    wantedBy = [ "sockets.target" ];
    socketConfig = {
      ListenStream = map (address: lib.removePrefix "unix:" address) addresses;
      SocketUser = user;
      SocketGroup = user;
      SocketMode = "0660";
      Backlog = 1024;
    };
  };
}
