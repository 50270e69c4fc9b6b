// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Terminals: a guest's console, a node's shell. xterm.js on a Connection; loaded on demand.
import '@xterm/xterm/css/xterm.css';

import { ActionIcon, Button, Group, Text, Tooltip } from '@mantine/core';
import { IconExternalLink, IconPlayerPlay, IconPlugConnected } from '@tabler/icons-react';
import { useMutation } from '@tanstack/react-query';
import { FitAddon } from '@xterm/addon-fit';
import { Terminal } from '@xterm/xterm';
import { useEffect, useRef, useState, type ReactNode, type RefObject } from 'react';

import { call, path } from '../api/client';
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

/** A terminal in `holder`, connected while there is something to connect to. */
function useTerminal(base: string, up: boolean): Session {
  const holder = useRef<HTMLDivElement>(null);
  const [state, setState] = useState<ConnectionState>({ phase: 'connecting' });
  const connection = useRef<Connection | null>(null);
  useEffect(() => {
    if (!up || !holder.current) return undefined;
    const terminal = new Terminal({ theme: THEME, fontSize: 13, scrollback: SCROLLBACK_LINES, cursorBlink: true, screenReaderMode: false, fontFamily: 'ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace' });
    const fit = new FitAddon();
    terminal.loadAddon(fit);
    terminal.open(holder.current);
    fit.fit();
    const made = new Connection(base, {
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
  }, [up, base]);
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

interface ScreenProps {
  /** Path of what has the terminal. */
  base: string;
  title: string;
  label: string;
  up: boolean;
  /** Shown instead of the terminal while there is nothing to connect to. */
  note?: ReactNode;
  /** Address of a window of its own; without it this is one, or there is none. */
  window?: string;
  alone?: boolean;
}

function Screen({ base, title, label, up, note, window, alone = false }: ScreenProps) {
  const { holder, state, reconnect } = useTerminal(base, up);
  return (
    <div className={alone ? 'atoll-console atoll-console-alone' : 'atoll-console'}>
      <Group justify="space-between" px={8} h={34} wrap="nowrap" className="atoll-console-bar">
        <Text size="sm" role="status" data-phase={up ? state.phase : 'stopped'} truncate>
          {alone && `${title}: `}
          {up ? phaseText(state) : 'Not running'}
        </Text>
        <Group gap={4} wrap="nowrap">
          {up && state.phase !== 'open' && (
            <Button variant="default" size="compact-xs" leftSection={<IconPlugConnected size={13} aria-hidden />} onClick={reconnect}>
              Connect now
            </Button>
          )}
          {window && (
            <Tooltip label="Open in a window of its own">
              <ActionIcon component="a" href={window} target={`atoll${window.replaceAll('/', '-')}`} variant="subtle" color="gray" size="sm" aria-label="Open the console in a window of its own">
                <IconExternalLink size={15} />
              </ActionIcon>
            </Tooltip>
          )}
        </Group>
      </Group>
      {up ? <div ref={holder} className="atoll-terminal" aria-label={label} role="group" /> : note}
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
  const title = guestTitle(guest);
  return (
    <Screen
      base={guestPath(guest)}
      title={title}
      label={`Console of ${title}`}
      up={up}
      note={<StoppedNote guest={guest} />}
      alone={alone}
      {...(alone ? {} : { window: `/console/${guest.vmid}` })}
    />
  );
}

export function NodeShell({ node }: { node: string }) {
  return <Screen base={path`/nodes/${node}`} title={node} label={`Shell of node ${node}`} up />;
}
