// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// A guest's console: xterm.js on a Connection. Loaded on demand.
import '@xterm/xterm/css/xterm.css';

import { ActionIcon, Button, Group, Text, Tooltip } from '@mantine/core';
import { IconExternalLink, IconPlayerPlay, IconPlugConnected } from '@tabler/icons-react';
import { useMutation } from '@tanstack/react-query';
import { FitAddon } from '@xterm/addon-fit';
import { Terminal } from '@xterm/xterm';
import { useEffect, useRef, useState, type RefObject } from 'react';

import { call } from '../api/client';
import { guestPath, refresh } from '../api/queries';
import type { Guest } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { guestTitle } from '../lib/guest';
import { watchTask } from '../tasks/watch';
import { Connection, type ConnectionState } from './connection';

const THEME = { background: '#11151a', foreground: '#e3e7eb', cursor: '#4db5c2', selectionBackground: '#2b5a63' };
const SCROLLBACK_LINES = 5000;

interface Session {
  holder: RefObject<HTMLDivElement | null>;
  state: ConnectionState;
  reconnect: () => void;
}

/** A terminal in `holder`, connected while the guest is up. */
function useTerminal(guest: Guest, up: boolean): Session {
  const holder = useRef<HTMLDivElement>(null);
  const [state, setState] = useState<ConnectionState>({ phase: 'connecting' });
  const connection = useRef<Connection | null>(null);
  const { node, type, vmid } = guest;
  useEffect(() => {
    if (!up || !holder.current) return undefined;
    const terminal = new Terminal({ theme: THEME, fontSize: 13, scrollback: SCROLLBACK_LINES, cursorBlink: true, screenReaderMode: false, fontFamily: 'ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace' });
    const fit = new FitAddon();
    terminal.loadAddon(fit);
    terminal.open(holder.current);
    fit.fit();
    const made = new Connection({ node, type, vmid, id: `${type}/${vmid}` }, {
      output: (bytes) => terminal.write(bytes),
      state: (next) => {
        setState(next);
        // The backlog comes again with each connection.
        if (next.phase === 'connecting') terminal.reset();
        if (next.phase === 'open') terminal.focus();
      },
      size: () => ({ columns: terminal.cols, rows: terminal.rows }),
    });
    connection.current = made;
    terminal.onData((text) => made.send(text));
    terminal.onResize(({ cols, rows }) => made.resize(cols, rows));
    const observer = new ResizeObserver(() => fit.fit());
    observer.observe(holder.current);
    void made.connect();
    return () => {
      observer.disconnect();
      made.close();
      terminal.dispose();
      connection.current = null;
    };
  }, [up, node, type, vmid]);
  return { holder, state, reconnect: () => void connection.current?.connect() };
}

const PHASES = { connecting: 'Connecting…', open: 'Connected' } as const;

function phaseText(state: ConnectionState): string {
  if (state.phase === 'waiting') return `Disconnected; next try in ${state.seconds} s`;
  return state.phase === 'refused' ? state.reason : PHASES[state.phase];
}

function StoppedNote({ guest }: { guest: Guest }) {
  const start = useMutation({ mutationFn: () => call<string>('POST', `${guestPath(guest)}/status/start`), onSuccess: (upid) => void watchTask(upid), onSettled: refresh });
  return (
    <div className="atoll-console-note">
      <Text>{guestTitle(guest)} is not running.</Text>
      <Button leftSection={<IconPlayerPlay size={14} aria-hidden />} onClick={() => start.mutate()} loading={start.isPending}>
        Start
      </Button>
      <ErrorNote error={start.error} />
    </div>
  );
}

interface ConsoleProps {
  guest: Guest;
  /** Fills the window; no button to open one. */
  alone?: boolean;
}

export function Console({ guest, alone = false }: ConsoleProps) {
  const up = guest.status === 'running' || guest.status === 'paused' || guest.status === 'suspended';
  const { holder, state, reconnect } = useTerminal(guest, up);
  return (
    <div className={alone ? 'atoll-console atoll-console-alone' : 'atoll-console'}>
      <Group justify="space-between" px={8} h={34} wrap="nowrap" className="atoll-console-bar">
        <Text size="sm" role="status" data-phase={up ? state.phase : 'stopped'} truncate>
          {alone && `${guestTitle(guest)}: `}
          {up ? phaseText(state) : 'Not running'}
        </Text>
        <Group gap={4} wrap="nowrap">
          {up && state.phase !== 'open' && (
            <Button variant="default" size="compact-xs" leftSection={<IconPlugConnected size={13} aria-hidden />} onClick={reconnect}>
              Connect now
            </Button>
          )}
          {!alone && (
            <Tooltip label="Open in a window of its own">
              <ActionIcon component="a" href={`/console/${guest.vmid}`} target={`atoll-console-${guest.vmid}`} variant="subtle" color="gray" size="sm" aria-label="Open the console in a window of its own">
                <IconExternalLink size={15} />
              </ActionIcon>
            </Tooltip>
          )}
        </Group>
      </Group>
      {up ? <div ref={holder} className="atoll-terminal" aria-label={`Console of ${guestTitle(guest)}`} role="group" /> : <StoppedNote guest={guest} />}
    </div>
  );
}
