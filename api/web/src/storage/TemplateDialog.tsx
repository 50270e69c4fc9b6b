// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Has the node download a container template from its signed indexes into a storage, or fetch the indexes anew.
import { Anchor, Select, Text } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useState } from 'react';

import { call, path } from '../api/client';
import { refresh, useTemplates } from '../api/queries';
import type { IndexedTemplate } from '../api/types';
import { ActionDialog } from '../app/ActionDialog';
import { watchTask } from '../tasks/watch';

interface TemplateProps {
  node: string;
  storage: string;
  onClose: () => void;
}

function options(templates: IndexedTemplate[]) {
  return templates.map((one) => ({ value: one.template, label: `${one.package} ${one.version}` })).sort((a, b) => a.label.localeCompare(b.label));
}

export function TemplateDialog({ node, storage, onClose }: TemplateProps) {
  const templates = useTemplates(node);
  const [template, setTemplate] = useState<string | null>(null);
  const chosen = templates.data?.find((one) => one.template === template);
  const download = () => call<string>('POST', path`/nodes/${node}/aplinfo`, { storage, template: template ?? '' });
  const renew = useMutation({
    mutationFn: () => call<string>('PUT', path`/nodes/${node}/aplinfo`),
    onSuccess: (upid) => watchTask(upid),
    onSettled: refresh,
  });
  return (
    <ActionDialog title={`Download a template to ${storage}`} verb="Download" act={download} onClose={onClose} valid={template !== null} size="md" error={renew.error ?? templates.error}>
      {(errors) => (
        <>
          <Select
            label="Template"
            description={
              <>
                From the indexes that this node knows.{' '}
                <Anchor component="button" type="button" size="xs" disabled={renew.isPending} onClick={() => renew.mutate()}>
                  Refresh them
                </Anchor>
              </>
            }
            required
            searchable
            data-autofocus
            limit={200}
            nothingFoundMessage="No such template"
            value={template}
            error={errors['template']}
            onChange={setTemplate}
            data={options(templates.data ?? [])}
          />
          {chosen && (
            <Text size="sm">
              <b>{chosen.headline}</b> {chosen.description}
            </Text>
          )}
        </>
      )}
    </ActionDialog>
  );
}
