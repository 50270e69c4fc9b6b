// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// A table of tasks; a row opens its log.
import { DataTable, type DataTableColumn } from 'mantine-datatable';

import type { Task } from '../api/types';
import { useOpenTask } from '../app/navigation';
import { duration, time } from '../lib/format';
import { taskOutcome, taskTitle } from '../lib/guest';
import { TaskOutcome } from '../ui/Status';

const COLUMNS: DataTableColumn<Task>[] = [
  { accessor: 'starttime', title: 'Start', width: 150, render: (task) => time(task.starttime) },
  { accessor: 'duration', title: 'Duration', width: 90, render: (task) => (task.endtime ? duration(Math.max(1, task.endtime - task.starttime)) : '–') },
  { accessor: 'node', title: 'Node', width: 120, ellipsis: true },
  { accessor: 'user', title: 'User', width: 150, ellipsis: true },
  {
    accessor: 'type',
    title: 'Task',
    ellipsis: true,
    render: (task) => (
      <button type="button" className="atoll-link" data-upid={task.upid}>
        {taskTitle(task.type, task.id)}
      </button>
    ),
  },
  { accessor: 'status', title: 'Result', width: '35%', ellipsis: true, render: (task) => <TaskOutcome status={task.endtime ? task.status : (task.status ?? 'running')} /> },
];

interface TaskTableProps {
  tasks: Task[] | undefined;
  height?: number | string;
  empty?: string;
}

/** Newest first, whatever is running on top. */
export function sortTasks(tasks: Task[]): Task[] {
  const running = (task: Task) => (taskOutcome(task.status) === 'running' ? 1 : 0);
  return [...tasks].sort((a, b) => running(b) - running(a) || b.starttime - a.starttime);
}

export function TaskTable({ tasks, height, empty }: TaskTableProps) {
  const open = useOpenTask();
  return (
    <DataTable
      idAccessor="upid"
      records={sortTasks(tasks ?? [])}
      columns={COLUMNS}
      fetching={tasks === undefined}
      minHeight={tasks?.length ? 0 : 90}
      {...(height === undefined ? {} : { height })}
      noRecordsText={empty ?? 'No tasks yet'}
      verticalSpacing={3}
      highlightOnHover
      fz="sm"
      onRowClick={({ record }) => open(record.upid)}
    />
  );
}
