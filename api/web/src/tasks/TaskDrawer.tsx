// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// One task: how it stands, and its log as it grows.
import { ActionIcon, Button, Drawer, Group, Stack, Text, Tooltip } from '@mantine/core';
import { IconCopy, IconPlayerStop } from '@tabler/icons-react';
import { useMutation, useQuery } from '@tanstack/react-query';
import { useEffect, useRef } from 'react';

import { call, envelope } from '../api/client';
import { refresh } from '../api/queries';
import type { TaskStatus } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { time } from '../lib/format';
import { Facts } from '../ui/Panel';
import { TaskOutcome } from '../ui/Status';
import { taskPath, titleOfUpid } from './watch';

interface Line {
  n: number;
  t: string;
}

const LOG_POLL_MS = 1000;
/** Longest log shown; the rest is for `atoll get …/log`. */
const LINES_MAX = 5000;

function useTask(upid: string) {
  const status = useQuery({
    queryKey: [`${taskPath(upid)}/status`],
    queryFn: ({ signal }) => call<TaskStatus>('GET', `${taskPath(upid)}/status`, {}, signal),
    refetchInterval: (query) => (query.state.data?.status === 'stopped' ? false : LOG_POLL_MS),
  });
  const running = status.data?.status === 'running';
  const log = useQuery({
    // The last read comes after the end, so that no line is missed.
    queryKey: [`${taskPath(upid)}/log`, running],
    queryFn: async ({ signal }) => (await envelope<Line[]>('GET', `${taskPath(upid)}/log`, { start: 0, limit: LINES_MAX }, signal)).data,
    placeholderData: (previous) => previous,
    refetchInterval: running ? LOG_POLL_MS : false,
  });
  return { status, log, running };
}

function Log({ lines }: { lines: Line[] }) {
  const box = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  useEffect(() => {
    if (follows.current) box.current?.scrollTo({ top: box.current.scrollHeight });
  }, [lines]);
  const onScroll = () => {
    const element = box.current;
    // Whoever scrolls up to read is left there.
    if (element) follows.current = element.scrollHeight - element.scrollTop - element.clientHeight < 24;
  };
  return (
    <div ref={box} className="atoll-log" role="log" aria-label="Task log" tabIndex={0} onScroll={onScroll}>
      {lines.map((line) => (
        <div key={line.n} className={line.t.startsWith('TASK ERROR') ? 'atoll-bad' : line.t.startsWith('TASK WARN') ? 'atoll-warn' : undefined}>
          {line.t}
        </div>
      ))}
    </div>
  );
}

function TaskView({ upid }: { upid: string }) {
  const { status, log, running } = useTask(upid);
  const stop = useMutation({ mutationFn: () => call('DELETE', taskPath(upid)), onSettled: refresh });
  const lines = log.data ?? [];
  return (
    <Stack gap="sm" h="100%">
      <ErrorNote error={status.error ?? stop.error} />
      {status.data && (
        <Facts
          rows={[
            ['Result', <TaskOutcome key="r" status={running ? 'running' : (status.data.exitstatus ?? 'unknown')} />],
            ['Node', status.data.node],
            ['User', status.data.user],
            ['Started', time(status.data.starttime)],
            ['UPID', <span key="u" className="atoll-mono">{upid}</span>],
          ]}
        />
      )}
      <Group justify="space-between">
        <Text fw={600} size="sm">
          Log
        </Text>
        <Group gap={6}>
          <Tooltip label="Copy the log">
            <ActionIcon variant="subtle" color="gray" aria-label="Copy the log" onClick={() => void navigator.clipboard.writeText(lines.map((line) => line.t).join('\n'))}>
              <IconCopy size={15} />
            </ActionIcon>
          </Tooltip>
          <Button color="red" variant="light" disabled={!running} loading={stop.isPending} leftSection={<IconPlayerStop size={14} aria-hidden />} onClick={() => stop.mutate()}>
            Stop the task
          </Button>
        </Group>
      </Group>
      <ErrorNote error={log.error} />
      <Log lines={lines} />
    </Stack>
  );
}

export function TaskDrawer({ upid, onClose }: { upid: string | undefined; onClose: () => void }) {
  return (
    <Drawer
      opened={upid !== undefined}
      onClose={onClose}
      position="right"
      size="lg"
      title={titleOfUpid(upid ?? '')}
      closeButtonProps={{ 'aria-label': 'Close the task' }}
      classNames={{ body: 'atoll-drawer-body', content: 'atoll-drawer' }}
    >
      {upid && <TaskView key={upid} upid={upid} />}
    </Drawer>
  );
}
