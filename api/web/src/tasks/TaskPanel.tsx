// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The strip at the bottom: the cluster's recent tasks, or one line of them when closed.
import { ActionIcon, Group, Text, UnstyledButton } from '@mantine/core';
import { IconChevronDown, IconChevronUp } from '@tabler/icons-react';

import { useTasks } from '../api/queries';
import { ErrorNote } from '../app/ErrorPage';
import { taskOutcome, taskTitle } from '../lib/guest';
import { TaskOutcome } from '../ui/Status';
import { sortTasks, TaskTable } from './TaskTable';

export function TaskPanel({ open, onToggle }: { open: boolean; onToggle: () => void }) {
  const tasks = useTasks();
  const list = sortTasks(tasks.data ?? []);
  const running = list.filter((task) => taskOutcome(task.status) === 'running').length;
  const newest = list[0];
  const Chevron = open ? IconChevronDown : IconChevronUp;
  return (
    <section aria-label="Tasks" className="atoll-tasks">
      <Group justify="space-between" h={32} px="sm" wrap="nowrap">
        <UnstyledButton onClick={onToggle} aria-expanded={open} className="atoll-tasks-title">
          <Text size="sm" fw={600} component="span">
            Tasks
          </Text>
          {running > 0 && (
            <Text size="sm" c="dimmed" component="span">
              {running} running
            </Text>
          )}
          {!open && newest && (
            <Text size="sm" component="span" truncate>
              {taskTitle(newest.type, newest.id)} <TaskOutcome status={newest.status} />
            </Text>
          )}
        </UnstyledButton>
        <ActionIcon variant="subtle" color="gray" size="sm" onClick={onToggle} aria-label={open ? 'Hide the tasks' : 'Show the tasks'}>
          <Chevron size={15} />
        </ActionIcon>
      </Group>
      {open && (tasks.isError ? <ErrorNote error={tasks.error} /> : <TaskTable tasks={tasks.data} height={157} />)}
    </section>
  );
}
