// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Follows a task that this page began, so that its failure is told where it was begun and its effect is seen at once.
import { notifications } from '@mantine/notifications';

import { call, path } from '../api/client';
import { refresh } from '../api/queries';
import { session } from '../api/session';
import type { TaskStatus } from '../api/types';
import { taskOutcome, taskTitle } from '../lib/guest';

const POLL_MS = 700;

export function taskPath(upid: string): string {
  return path`/nodes/${upid.split(':')[1] ?? ''}/tasks/${upid}`;
}

/** Type and subject of a task, in words. */
export function titleOfUpid(upid: string): string {
  const [, , , , , type, id] = upid.split(':');
  return taskTitle(type ?? '', id);
}

/** Waits for the task's end in the background; says so when it failed. */
export async function watchTask(upid: string): Promise<void> {
  while (session.current) {
    const status = await call<TaskStatus>('GET', `${taskPath(upid)}/status`).catch(() => null);
    if (!status) return;
    if (status.status === 'stopped') {
      if (taskOutcome(status.exitstatus ?? 'unknown') === 'failed') {
        notifications.show({
          color: 'red',
          title: `Failed – ${titleOfUpid(upid)}`,
          message: status.exitstatus,
          autoClose: false,
          closeButtonProps: { 'aria-label': 'Dismiss' },
        });
      }
      return refresh();
    }
    await new Promise((resume) => setTimeout(resume, POLL_MS));
  }
}
